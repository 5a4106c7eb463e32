"""`parloop check` on vLLM's server, which batches, caches prefixes and computes in 16 bits: right."""

from parloop.check import check_checkpoint


def test_vllm_is_right():
    verdict = check_checkpoint(engine="vllm")
    assert verdict.right, verdict
    assert "log-probabilities within" in verdict.details[0]
