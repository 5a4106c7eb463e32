"""Overrides of transformers' `generate()` for a PLT. Each says what breaks without it."""

from typing import Any

from transformers.generation import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, EarlyExitCandidateGenerator

from .cache import cached_loops, extend_cache
from .cache_argument import CACHE, takes_cache
from .call import check_inputs
from .configuration import loop_count
from .masks import plt_masks


class PLTGenerationMixin(GenerationMixin):
    """`generate()` with the loop dial, exact tails of prompts, compiled steps, and drafts by fewer loops."""

    def prepare_inputs_for_generation(self: Any, *args, inputs_embeds=None, output_loop_states: bool = False, **kwargs):
        # Without it, every step keeps per-loop states of the whole prompt: memory that generate() has no use for. (The name
        # inputs_embeds stands in the signature since generate() looks for it there.)
        kwargs["inputs_embeds"] = inputs_embeds
        inputs = GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)
        return inputs | {"output_loop_states": output_loop_states}

    def _prefill(self: Any, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # Without it, chunks of a prompt (prefill_chunk_size) would each be taken for a whole prompt, and run later loops on the
        # tail of each. `input_ids` either holds the cached tokens too, and is then as long as the mask, or the new ones only.
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size is not None and cache is not None:
            masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            past = 0 if masked == input_ids.shape[1] else int(cache.get_seq_length())
            model_kwargs = model_kwargs | {"prompt_tokens": past + input_ids.shape[1]}
        return GenerationMixin._prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(self: Any, generation_config, model_kwargs, *args, **kwargs):
        # Without it, a static or quantized cache that generate() makes has no windows and carries when steps are compiled, and a
        # draft model's cache does not record what a rejected draft has to be cropped to.
        GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            num_loops = model_kwargs.get("num_loops")
            extend_cache(cache, self.config, self.config.plt_num_loops if num_loops is None else loop_count(num_loops))
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _get_candidate_generator(
        self: Any, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, *args, **kwargs
    ):
        # Without it, assistant_early_exit=n would run n of the layers, in caches of another layout, and leave the model's
        # configuration with n layers when that fails.
        n = generation_config.assistant_early_exit
        if n is None:
            return GenerationMixin._get_candidate_generator(
                self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, *args, **kwargs
            )
        num_loops = model_kwargs.get("num_loops")
        looped = (self.config.plt_num_loops if num_loops is None else loop_count(num_loops)) > 1
        kind = LoopExitCandidateGenerator if looped else LayerExitCandidateGenerator
        return kind(
            input_ids=input_ids,
            assistant_model=self,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
        )

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "transformers' continuous batching pages full and sliding layers only and cannot hold the state that a PLT "
            "carries from token to token: use generate() with a left-padded batch instead."
        )

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache, position_ids=None, **kwargs):
        # All masks of a step in advance, for compiled decoding with a static cache. Without it, they would be made inside the
        # compiled step, and only those of a Llama.
        loops = cached_loops(cache, config) or config.plt_num_loops
        attention_mask, _ = check_inputs(config, loops, inputs_embeds, attention_mask, None, cache)
        masks = plt_masks(config, loops, inputs_embeds, attention_mask, cache, position_ids)
        if inputs_embeds.shape[1] == 1:  # it grows with the text, and a compiled step would be compiled again
            del masks["padding"]
        return masks


class LoopExitCandidateGenerator(AssistedCandidateGenerator):
    """Drafts by the model itself with fewer loops: `generate(..., assistant_early_exit=n)` drafts with n of the R loops.

    The early exit of a looped model: the text is the same as without drafts. Drafts have a cache of their own.

    Raises:
        ValueError: n is not a loop count below R.
    """

    def __init__(self, assistant_model: Any, generation_config: Any, model_kwargs: dict, **kwargs):
        exit_after = loop_count(generation_config.assistant_early_exit, "assistant_early_exit")
        given = model_kwargs.get("num_loops")
        R = assistant_model.config.plt_num_loops if given is None else given
        if exit_after >= R:
            raise ValueError(
                f"assistant_early_exit={exit_after} must be below the loop count {R}: in a looped model it is the number of loops "
                f"that drafts are made with."
            )
        super().__init__(
            assistant_model=assistant_model, generation_config=generation_config, model_kwargs=model_kwargs, **kwargs
        )
        self.generation_config.assistant_early_exit = None  # or the drafts would be drafted, too
        self.assistant_kwargs["num_loops"] = exit_after
        assistant_model.base_model.warned_loops.add(exit_after)  # asked for, so no warning of worse text


class LayerExitCandidateGenerator(EarlyExitCandidateGenerator):
    """Drafts by the first n layers of a model of one loop, as the library's for Llama; the model stays whole when one fails.

    Raises:
        ValueError: n is not a number of layers of the model.
    """

    def __init__(self, assistant_model: Any, generation_config: Any, **kwargs):
        n, L = generation_config.assistant_early_exit, assistant_model.config.num_hidden_layers
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= L:
            raise ValueError(
                f"assistant_early_exit={n!r} must be a number of layers from 1 to {L}, which drafts are made with."
            )
        super().__init__(assistant_model=assistant_model, generation_config=generation_config, **kwargs)

    def get_candidates(self, input_ids, **kwargs):
        config: Any = self.assistant_model.base_model.config
        layers = config.num_hidden_layers
        try:
            return super().get_candidates(input_ids, **kwargs)
        finally:
            config.num_hidden_layers = layers
