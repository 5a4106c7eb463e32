"""The vendor's outputs through vLLM's scheduler, whatever it does with the requests."""

import numpy as np
import pytest
from conftest import LENGTHS, TOLERANCE, engine, free_blocks, metric, tokens
from vllm import SamplingParams


def test_single_and_prompt(case):
    with engine(case.folder) as llm:
        for T in LENGTHS:
            params = case.greedy(prompt_logprobs=case.vocabulary)
            (output,) = llm.generate(tokens(case.prompt(T)), params, use_tqdm=False)
            case.check(T, output.outputs[0])
            if T > 1:
                expected = case.outputs[f"logprobs_{T}"][:-1]
                np.testing.assert_allclose(case.table(output.prompt_logprobs[1:]), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("budget", [None, 16], ids=["whole", "chunked"])
def test_batch_of_different_lengths(case, budget):
    options = {} if budget is None else {"max_num_batched_tokens": budget, "max_num_seqs": 8}
    with engine(case.folder, **options) as llm:
        order = [200, 1, 40, 5, 40, 200]
        outputs = llm.generate(tokens(*map(case.prompt, order)), case.greedy(), use_tqdm=False)
        for T, output in zip(order, outputs):
            case.check(T, output.outputs[0])
        free, total = free_blocks(llm)
        assert free == total


@pytest.mark.parametrize("interval", [0, 32], ids=["vllm-default", "every-block"])
def test_prefix_caching(case, interval):
    """A request that shares a prefix with an earlier one, with the borders of blocks on either side of what it shares."""
    rng = np.random.default_rng(0)
    prompt = case.prompt(200)
    with engine(case.folder, enable_prefix_caching=True, prefix_cache_retention_interval=interval) as llm:
        for shared in (1, 31, 32, 33, 160, 192):
            llm.reset_prefix_cache()
            different = (prompt[shared] + 1 + rng.integers(case.vocabulary - 1)) % case.vocabulary
            earlier = [*prompt[:shared], int(different), *rng.integers(case.vocabulary, size=40).tolist()]
            before = metric(llm, "vllm:prefix_cache_hits")
            (first,) = llm.generate(tokens(earlier), case.greedy(8), use_tqdm=False)
            case.check_by_reference(earlier, first.outputs[0])
            (second,) = llm.generate(tokens(prompt), case.greedy(), use_tqdm=False)
            case.check(200, second.outputs[0])
            hits = metric(llm, "vllm:prefix_cache_hits") - before
            if interval:
                assert hits == shared // 32 * 32
            again, longer = llm.generate(tokens(prompt, [*prompt, *earlier]), case.greedy(), use_tqdm=False)
            case.check(200, again.outputs[0])
            case.check_by_reference([*prompt, *earlier], longer.outputs[0])
            assert metric(llm, "vllm:prefix_cache_hits") - before - hits >= 192


def test_many_preemptions(case):
    """Twelve short prompts fit when they start, and not when they grow."""
    loops = case.config["plt_num_loops"]
    with engine(case.folder, num_gpu_blocks_override=1 + 13 * (2 * loops - 1), max_num_seqs=12, max_model_len=256) as llm:
        order = [5, 5, 1, 5, 5, 1, 5, 5, 1, 5, 5, 200]
        outputs = llm.generate(tokens(*map(case.prompt, order)), case.greedy(), use_tqdm=False)
        for T, output in zip(order, outputs):
            case.check(T, output.outputs[0])
        assert metric(llm, "vllm:num_preemptions") >= 5
        free, total = free_blocks(llm)
        assert free == total


@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix-caching"])
def test_four_samples_of_one_request(case, caching):
    params = SamplingParams(
        n=4, temperature=1.0, seed=1, max_tokens=24, ignore_eos=True, logprobs=case.vocabulary, detokenize=False
    )
    with engine(case.folder, enable_prefix_caching=caching) as llm:
        for T in (40, 200):
            (output,) = llm.generate(tokens(case.prompt(T)), params, use_tqdm=False)
            assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
            for sample in output.outputs:
                case.check_by_reference(case.prompt(T), sample)


def test_aborted_requests_and_reused_slots(case):
    """Requests that vanish half-way, while others take their places and blocks in the very next step."""
    with engine(case.folder, max_num_seqs=3, max_num_batched_tokens=64, num_gpu_blocks_override=64) as llm:
        server, finished = llm.llm_engine, {}
        waiting = [(f"{i}-{T}", T) for i, T in enumerate([200, 40, 5, 1, 200, 40, 200, 5, 40, 1, 200, 200])]
        step = 0
        while waiting or server.has_unfinished_requests():
            while waiting and server.get_num_unfinished_requests() < 3:
                name, T = waiting.pop(0)
                server.add_request(name, tokens(case.prompt(T))[0], case.greedy())
            for output in server.step():
                if output.finished:
                    finished[output.request_id] = output
            step += 1
            if step % 25 == 0 and server.has_unfinished_requests():
                running = list(server.output_processor.request_states)
                server.abort_request([running[step % len(running)]], internal=True)
        assert 0 < len(finished) < 12
        for name, output in finished.items():
            case.check(int(name.split("-")[1]), output.outputs[0])
        free, total = free_blocks(llm)
        assert free == total
