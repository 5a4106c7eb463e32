"""The Parallel Loop Transformer made of vLLM's layers: the equations of model/modeling.py, over vLLM's paged cache.

A step of vLLM holds tokens of many requests, concatenated. There are two ways to compute it (`PLTModel.forward`):

    one pass         no request has more than one token: the loops of all tokens are rows of one pass over the weights
    loop after loop  some request has more, as prompts do: R passes over all tokens

Both write and read the same cache, position by position, so chunked prompts, prefix caching, preemption and rejected drafts concern only
the scheduler. The cache holds, in vLLM's layers:

    attn             loop 1's keys and values, of every token
    read, read_all   nothing: later loops, or all at once, attend to loop 1's through them (vLLM's sharing between layers)
    window_loop r    loop r's own keys and values, of the last w tokens
    carry            loop r's state, which loop r + 1 reads one token later (vllm_carry.py)

Axes: N tokens of this step (or R * N rows), D hidden size, H query heads of this rank, K head size. Loops are numbered 1..R in
prose, from 0 in code.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .plugin import check_vllm_version

check_vllm_version()

from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed import get_tensor_model_parallel_world_size  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear  # noqa: E402
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: E402
from vllm.model_executor.layers.rotary_embedding import get_rope  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader  # noqa: E402
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant  # noqa: E402
from vllm.model_executor.models.llama import LlamaMLP  # noqa: E402
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix  # noqa: E402
from vllm.model_executor.utils import set_weight_attrs  # noqa: E402

from ..model.configuration import GATE, GATE_ALIASES, PLTConfig  # noqa: E402
from ..quantize.form import Scheme  # noqa: E402
from .vllm_carry import Carry  # noqa: E402
from .vllm_weights import checked  # noqa: E402

logger = init_logger("vllm.parloop")

Rows = Sequence[torch.Tensor]  # one tensor per loop
# Backends that write the cache separately from attention, and take any number of query heads per key head.
READ_AT_ONCE = {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"}


class PLTGate(nn.Module):
    """g = sigmoid(gate(x)) for the heads of this rank.

    Its parameters are plain ones, neither quantised nor repacked for the CPU's kernels, in float32, which costs nothing at this size: on CPUs,
    bfloat16 products of so few columns are slower.
    """

    def __init__(self, config: PLTConfig, num_heads: int):
        super().__init__()
        self.reads_hidden = config.plt_gate_use_hidden_states
        inputs = config.hidden_size if self.reads_hidden else config.head_dim
        self.weight = nn.Parameter(torch.zeros(num_heads, inputs, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        if self.reads_hidden:
            self.gate_norm = nn.RMSNorm(inputs, eps=config.rms_norm_eps, dtype=torch.float32)

    def forward(self, x_ND: torch.Tensor, q_NHK: torch.Tensor) -> torch.Tensor:
        """Compute the gate.

        Args:
            x_ND: the layer's input before the layer's own norm.
            q_NHK: the rotated query.

        Returns:
            g [N, H, 1], float32.
        """
        if self.reads_hidden:
            logits_NH = F.linear(self.gate_norm(x_ND.float()), self.weight, self.bias)
        else:
            logits_NH = torch.einsum("nhk,hk->nh", q_NHK.float(), self.weight) + self.bias
        return logits_NH.sigmoid()[..., None]


class PLTAttention(nn.Module):
    """Attention of one layer for any loop: shared projections; gated global and local attention from loop 2 on."""

    def __init__(self, config: PLTConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        ranks, R, w = get_tensor_model_parallel_world_size(), config.plt_num_loops, config.window_tokens
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ValueError(
                f"tensor_parallel_size={ranks} does not divide {heads} heads and {kv_heads} key/value heads: choose one that "
                f"divides the heads, and divides or is a multiple of the key/value heads."
            )
        self.num_heads, self.num_kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.num_loops = R
        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            heads,
            kv_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=config.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )

        def attention(name: str, heads: int = self.num_heads, **options: Any) -> Attention:
            return Attention(
                heads,
                self.head_dim,
                self.head_dim**-0.5,
                num_kv_heads=self.num_kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=quant_config,
                prefix=f"{prefix}.{name}",
                **options,
            )

        self.attn = attention("attn")
        if R > 1:
            self.read = attention("read", kv_sharing_target_layer_name=f"{prefix}.attn")
            self.read_all: Attention | None = None
            if self.attn.attn_backend.get_name() in READ_AT_ONCE:
                heads_of_all = R * self.num_heads
                self.read_all = attention("read_all", heads_of_all, kv_sharing_target_layer_name=f"{prefix}.attn")
            # vLLM's window counts the token itself. With w = 0 the token sees only itself, which needs no cached keys.
            self.windows = nn.ModuleList(
                attention(f"window_loop{r + 1}", per_layer_sliding_window=w + 1) for r in range(1, R) if w > 0
            )
            self.plt_gate = PLTGate(config, self.num_heads)

    def forward(
        self, positions_N: torch.Tensor, normed_ND: torch.Tensor, x_ND: torch.Tensor, loop: int | None
    ) -> torch.Tensor:
        """Compute attention for rows of one loop, or of all.

        Args:
            positions_N: positions of the rows in their requests.
            normed_ND: the layer's input after the layer's norm.
            x_ND: the layer's input before it.
            loop: loop of the rows, from 0; None: all loops, first all rows of loop 1, then all of loop 2, ..

        Returns:
            the output [N, D], after the output projection.
        """
        qkv, _ = self.qkv_proj(normed_ND)
        H, G, K = self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = qkv.split([H * K, G * K, G * K], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:  # each head separately
            q = self.q_norm(q.reshape(-1, H, K)).flatten(1)
            k = self.k_norm(k.reshape(-1, G, K)).flatten(1)
        q, k = self.rotary_emb(positions_N, q, k)
        if loop == 0:
            out = self.attn(q, k, v)
        elif loop is not None:
            out = self._mix(self.read(q, k, v), self._local([q], [k], [v], loop), q, x_ND)
        else:
            N = len(q) // self.num_loops
            q_r, k_r, v_r = q.split(N), k.split(N), v.split(N)
            global_ = self._global(q, q_r, k_r, v_r)
            later = self._mix(global_[N:], self._local(q_r[1:], k_r[1:], v_r[1:], 1), q[N:], x_ND[N:])
            out = torch.cat((global_[:N], later))
        out, _ = self.o_proj(out)
        return out

    def _global(self, q: torch.Tensor, q_r: Rows, k_r: Rows, v_r: Rows) -> torch.Tensor:
        """Return attention of all loops' rows over loop 1's keys, [R * N, H * K]. Loop 1's new keys are written first.

        If the backend allows it, the loops are further heads of the same tokens, so that the cache is read once for all of them.
        """
        R, H, G, K = self.num_loops, self.num_heads, self.num_kv_heads, self.head_dim
        if self.read_all is None:
            first = self.attn(q_r[0], k_r[0], v_r[0])
            return torch.cat((first, *(self.read(*row) for row in zip(q_r[1:], k_r[1:], v_r[1:]))))
        unified_kv_cache_update(k_r[0].reshape(-1, G, K), v_r[0].reshape(-1, G, K), self.attn.layer_name)
        q_NGRhK = q.reshape(R, -1, G, H // G, K).permute(1, 2, 0, 3, 4)  # query heads of one key head are adjacent
        out_NGRhK = self.read_all(q_NGRhK.reshape(-1, R * H * K), k_r[0], v_r[0]).view(q_NGRhK.shape)
        return out_NGRhK.permute(2, 0, 1, 3, 4).reshape(-1, H * K)

    def _local(self, q_r: Rows, k_r: Rows, v_r: Rows, loop: int) -> torch.Tensor:
        """Return attention of the rows of `loop`, the next loop, .. over their own windows: [rows, H * K]."""
        if len(self.windows) == 0:
            heads = torch.cat(tuple(v_r)).unflatten(1, (self.num_kv_heads, -1))
            return heads.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1).flatten(1)
        windows = self.windows[loop - 1 :]
        return torch.cat([window(*row) for window, row in zip(windows, zip(q_r, k_r, v_r))])

    def _mix(self, global_: torch.Tensor, local: torch.Tensor, q: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """Return g * global + (1 - g) * local for rows of the loops 2..R: [rows, H * K]."""
        heads = (self.num_heads, self.head_dim)
        g_NH1 = self.plt_gate(x_ND, q.unflatten(1, heads)).to(global_.dtype)
        return torch.lerp(local.unflatten(1, heads), global_.unflatten(1, heads), g_NH1).flatten(1)


class PLTDecoderLayer(nn.Module):
    def __init__(self, config: PLTConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.self_attn = PLTAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, residual_ND: torch.Tensor | None, loop: int | None):
        """Run the layer. Its input and output are x + residual, as in vLLM's Llama: the norms add the two in one kernel."""
        if residual_ND is None:
            residual_ND, normed_ND = x_ND, self.input_layernorm(x_ND)
        else:
            normed_ND, residual_ND = self.input_layernorm(x_ND, residual_ND)
        attended_ND = self.self_attn(positions_N, normed_ND, residual_ND, loop)
        normed_ND, residual_ND = self.post_attention_layernorm(attended_ND, residual_ND)
        return self.mlp(normed_ND), residual_ND


class PLTModel(nn.Module):
    """The stack and its loops."""

    def __init__(self, config: PLTConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = config
        self.layers: Any  # lists of modules
        self.carries: Any
        L, R, D = config.num_hidden_layers, config.plt_num_loops, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, D, quant_config=vllm_config.quant_config, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(PLTDecoderLayer(config, vllm_config, f"{prefix}.layers.{i}") for i in range(L))
        self.norm = RMSNorm(D, eps=config.rms_norm_eps)
        attn = self.layers[0].self_attn
        size = attn.head_dim * attn.attn.kv_cache_torch_dtype.itemsize // vllm_config.model_config.dtype.itemsize
        names = [(f"{prefix}.layers", f"carry_loop{r + 1}") for r in range(R - 1)]
        self.carries = nn.ModuleList(Carry(D, attn.num_kv_heads, size, L, name, vllm_config) for name in names)
        # vLLM's LoRA finds a row's adapter by its index in the step, so with LoRA each loop needs a pass of its own.
        self.one_pass = vllm_config.lora_config is None and vllm_config.additional_config.get("plt_one_pass", True)

    def forward(self, input_ids: torch.Tensor | None, positions_N: torch.Tensor, inputs_embeds: torch.Tensor | None = None):
        e_ND = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.one_pass and self._one_token():
            return self._one_pass(e_ND, positions_N)
        return self._loop_by_loop(e_ND, positions_N)

    def _one_token(self) -> bool:
        metadata = self.carries[0].metadata() if len(self.carries) else None
        return metadata is not None and metadata[0].one_token

    def _loop_by_loop(self, e_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        h_ND = self._stack(e_ND, positions_N, 0)
        for loop, carry in enumerate(self.carries, start=1):
            carry.write(h_ND)
            h_ND = self._stack(self._combine(e_ND, carry.read(h_ND)), positions_N, loop)
        return h_ND

    def _one_pass(self, e_ND: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Run the loops of N tokens of N requests as R * N rows. Exact, since loop r reads loop r-1 of the token before, which is cached."""
        R, N = self.config.plt_num_loops, len(e_ND)
        later = [self._combine(e_ND, carry.read(e_ND)) for carry in self.carries]
        h_RND = self._stack(torch.cat((e_ND, *later)), positions_N.repeat(R), None).view(R, N, -1)
        for carry, h_ND in zip(self.carries, h_RND):
            carry.write(h_ND)
        return h_RND[-1]

    def _stack(self, x_ND: torch.Tensor, positions_N: torch.Tensor, loop: int | None) -> torch.Tensor:
        """Run all layers, and the norm that follows every loop, or the last loop only."""
        R = self.config.plt_num_loops
        residual_ND: Any = None
        for layer in self.layers:
            x_ND, residual_ND = layer(positions_N, x_ND, residual_ND, loop)
        if self.config.plt_normalize_per_loop or loop == R - 1:
            return self.norm(x_ND, residual_ND)[0]
        h_ND = x_ND + residual_ND
        if loop is None:  # the rows are of all loops
            N = len(h_ND) // R
            h_ND = torch.cat((h_ND[:-N], self.norm(h_ND[-N:])))
        return h_ND

    def _combine(self, e_ND: torch.Tensor, shifted_ND: torch.Tensor) -> torch.Tensor:
        """Return b = a * E + c * shift(h), the input of loops 2..R."""
        a, c = self.config.plt_emb_scale, self.config.plt_hidden_scale
        return (e_ND if a is None else a * e_ND) + (shifted_ND if c is None else c * shifted_ND)


class PLTForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """IQuestPLTCoderForCausalLM for vLLM."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={f".{alias}.": f".{GATE}." for alias in GATE_ALIASES},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config: PLTConfig = vllm_config.model_config.hf_config
        refuse_unsupported(vllm_config)
        overrides = vllm_config.model_config.hf_overrides
        self.loops_are_dialled = not isinstance(overrides, dict) or bool({"plt_num_loops", "num_loops"} & overrides.keys())
        # Trainers send weights later, one by one; other formats, and what other tools quantised, have other names and shapes.
        whole = vllm_config.load_config.load_format not in ("dummy", "bitsandbytes", "gguf")
        quantised = getattr(self.config, "quantization_config", None)
        self.check_weights = whole and (quantised is None or Scheme.of(quantised) is not None)
        self.model = PLTModel(self.config, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> torch.Tensor:
        """Return h_R [tokens, D] of a step's ids and positions [tokens]."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.check_weights:
            weights = checked(weights, self.config, gates_may_lack=self.loops_are_dialled)
            self.check_weights = False
        mapper = self.hf_to_vllm_mapper
        if self.config.plt_num_loops == 1:  # a looped checkpoint served with one loop
            mapper = mapper | WeightsMapper(orig_to_new_substr={f".{name}.": None for name in (GATE, *GATE_ALIASES)})
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        gates = {name for name, _ in self.named_parameters() if f".{GATE}." in name}
        if gates and not gates & loaded:
            logger.warning(
                "The checkpoint has no gates: it was trained with one loop. It is served with %d, every gate an even blend of "
                "global and local attention; expect worse text.",
                self.config.plt_num_loops,
            )
            loaded |= gates
        return loaded


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuse options with which vLLM would compute something else.

    Raises:
        ValueError: there is one.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    offset = vllm_config.model_config.hf_config.plt_offset
    if offset != 1:
        why = "needs a pass per loop" if offset == 0 else "needs the states of more than one token"
        raise ValueError(
            f"plt_offset={offset}: this plugin serves the paper's shift by one token (plt_offset=1), and another {why} in every step: "
            f"generate with transformers (parloop serve CHECKPOINT --engine transformers)."
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a PLT visits all layers once per loop, which vLLM's "
            f"pipeline (each stage once per step) cannot do. Use --tensor-parallel-size."
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(parallel, name)}: vLLM splits no sliding windows over context ranks, and a "
                f"PLT has them. Use --tensor-parallel-size."
            )
    calibrated = getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None
    if calibrated and cache.cache_dtype.startswith(("auto", "fp8")):
        raise ValueError(
            "The checkpoint brings scales for a cache in 8 bits, which the later loops' view of that cache would not get: use "
            "--kv-cache-dtype bfloat16."
        )
    if cache.kv_sharing_fast_prefill:
        raise ValueError(
            "--kv-sharing-fast-prefill skips layers that share another's cache during prefill. In a PLT these are the later "
            "loops of every layer, which prompts need: leave it out."
        )
    if vllm_config.lora_config is not None and vllm_config.model_config.hf_config.plt_num_loops > 1:
        logger.warning(
            "LoRA is on: a decode step takes a pass per loop, since vLLM finds a row's adapter by its index in the step."
        )
    if vllm_config.compilation_config.mode:
        logger.info("torch.compile leaves a PLT alone: decode steps and prompts take different ways through it.")
