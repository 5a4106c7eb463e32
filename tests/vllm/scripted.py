"""The plugin that test_agents.py loads into vLLM: any model writes the text in a request's `vllm_xargs`."""

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Script(AdapterLogitsProcessor):
    """The tokens of `script` come first; what follows them is the model's."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        script = (params.extra_args or {}).get("script")
        if script is None:
            return None

        def say(output_ids: list[int], logits):
            if len(output_ids) < len(script):
                logits.fill_(float("-inf"))
                logits[script[len(output_ids)]] = 0
            return logits

        return say
