"""The mixed-modal Transformer: Llama-2's shape with query-key normalization (paper section 2.3); and, by settings of
`ModelConfig`, what other text models have in its place, so that those can be made mixed-modal.

Its pass over a cache, for generation, is in generation/passes/decoder.py.

Shape suffixes: B batch, T tokens, L positions, D width, N heads, K key-value heads, H head size, P pairs of a
head (H/2), F feed-forward width, V vocabulary, R trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from calumma.model.config import ModelConfig
from calumma.model.ops import stability
from calumma.model.ops.attention import Mask, document_mask, rotate
from calumma.model.ops.loss import Loss, linear_logprobs, linear_loss, trained_rows
from calumma.model.ops.rope import rope_table
from calumma.model.ops.sharing import Attend, SharedRows, attend_whole, part_of

Recompute = Literal["none", "products", "all"]  # what of a block is kept: all; products' results; its input alone


class HeadNorm(nn.Module):
    """LayerNorm over the head size with a weight and bias for every head, as in the release."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_size))
        self.bias = nn.Parameter(torch.zeros(heads, head_size))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        normal = F.layer_norm(x_BTNH, (x_BTNH.shape[-1],), eps=1e-5)
        return torch.addcmul(self.bias, normal, self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.attend: Attend = attend_whole
        bias = config.query_key_value_bias
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=bias)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_size, bias=bias)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_size, bias=bias)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=config.attention_output_bias)
        self.normalize = bool(config.query_key_norm)  # bounds the attention logits
        if config.query_key_norm == "rms":
            self.query_norm: nn.Module = nn.RMSNorm(config.head_size, eps=config.norm_eps)
            self.key_norm: nn.Module = nn.RMSNorm(config.head_size, eps=config.norm_eps)
        elif config.query_key_norm:
            self.query_norm = HeadNorm(config.heads, config.head_size)
            self.key_norm = HeadNorm(config.kv_heads, config.head_size)

    def forward(self, x_BTD: Tensor, rope_BTP2: Tensor, mask: Mask, measure: bool) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x_BTD.shape
        q_BTNH = self.query(x_BTD).view(B, T, self.heads, self.head_size)
        k_BTKH = self.key(x_BTD).view(B, T, self.kv_heads, self.head_size)
        v_BTKH = self.value(x_BTD).view(B, T, self.kv_heads, self.head_size)
        if self.normalize:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, rope_BTP2), rotate(k_BTKH, rope_BTP2)
        out_BTNH, measured = self.attend(q_BTNH, k_BTKH, v_BTKH, mask, measure)
        return self.output(out_BTNH.reshape(B, T, -1)), measured


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=config.feed_forward_bias)
        self.up = nn.Linear(config.width, config.ffn_width, bias=config.feed_forward_bias)
        self.down = nn.Linear(config.ffn_width, config.width, bias=config.feed_forward_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class TransformerBlock(nn.Module):
    """Attention and feed-forward; `pre` normalizes their input (Llama), `swin` their output before the residual add."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.dropout = config.dropout
        self.swin = config.norm_order == "swin"
        self.recompute: Recompute = "none"

    def forward(
        self,
        x_BTD: Tensor,
        rope_BTP2: Tensor,
        mask: Mask = None,
        measure: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this block, and `stability.BLOCK` of it where asked for."""
        given = (x_BTD, rope_BTP2, mask, measure)
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return self._compute(*given)
        kept: dict[str, Any] = {} if self.recompute == "all" else {"context_fn": _keep_products}
        found: tuple[Tensor, Tensor | None] = checkpoint(self._compute, *given, use_reentrant=False, **kept)
        return found

    def _compute(
        self,
        x_BTD: Tensor,
        rope_BTP2: Tensor,
        mask: Mask,
        measure: bool,
    ) -> tuple[Tensor, Tensor | None]:
        a_BTD = x_BTD if self.swin else self.attention_norm(x_BTD)
        a_BTD, measured = self.attention(a_BTD, rope_BTP2, mask, measure)
        a_BTD = self.attention_norm(a_BTD) if self.swin else a_BTD
        x_BTD = x_BTD + F.dropout(a_BTD, self.dropout, self.training)
        if self.swin:
            f_BTD = self.feed_forward_norm(self.feed_forward(x_BTD))
        else:
            f_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        x_BTD = x_BTD + F.dropout(f_BTD, self.dropout, self.training)
        return x_BTD, None if measured is None else stability.block(measured, x_BTD)


def _keep_products() -> Any:
    """Of a recomputed block the results of matrix products and of attention are kept: little arithmetic comes again."""
    ops = torch.ops.aten
    kept = [
        ops.mm.default, ops.addmm.default, ops.bmm.default, ops._scaled_dot_product_flash_attention.default,
        ops._scaled_dot_product_efficient_attention.default, ops._scaled_dot_product_cudnn_attention.default,
        ops._scaled_dot_product_flash_attention_for_cpu.default,
    ]  # fmt: skip
    return create_selective_checkpoint_contexts(kept)


class Output(nn.Linear):
    """The output projection: logits, or the loss without them. The loss is computed in here because ZeRO 3 gathers a
    module's weights for the time of its forward pass. Where it is `tied`, its weight is the embedding's, and is stored
    and loaded as that alone."""

    def __init__(self, config: ModelConfig, embedding: nn.Embedding | None = None) -> None:
        super().__init__(config.width, config.vocabulary_size, bias=False, device="meta" if config.tied else None)
        self.tied = config.tied
        if self.tied:
            assert embedding is not None
            self.weight = embedding.weight

    def _save_to_state_dict(self, *given: Any) -> None:
        if not self.tied:
            super()._save_to_state_dict(*given)

    def _load_from_state_dict(self, *given: Any) -> None:
        if not self.tied:
            super()._load_from_state_dict(*given)

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Any:
        """float32 logits [..., V] of states [..., D], or only those of some columns of the vocabulary; or, given what
        `linear_loss` takes, its result and the measured [3] or None."""
        if not loss:
            return F.linear(input, self.weight if columns is None else self.weight[columns]).float()
        if loss.pop("scores", False):
            return linear_logprobs(input, self.weight, loss["targets_BT"], loss["rows_R"])
        measured = stability.output(input.flatten(0, 1), loss["rows_R"], self.weight) if measure else None
        return *linear_loss(input, self.weight, **loss), measured


class Transformer(nn.Module):
    """One decoder over text and image tokens; `config.vocabulary_size` ids in and out."""

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocabulary_size < 1:
            raise ValueError("the model's vocabulary_size must be set before it is built")
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.output = Output(config, self.embedding)
        self.shared: SharedRows | None = None
        self._compiled = False  # the blocks are
        self.register_buffer("rope", torch.empty(0), persistent=False)
        self.rebuild_rope(self.embedding.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts of the module; bf16 cannot hold positions beyond 256, so the table is made anew instead."""
        super()._apply(fn, recurse)
        self.tie()
        self.rebuild_rope(self.embedding.weight.device)
        return self

    def rebuild_rope(self, device: torch.device | str) -> None:
        """Make the rotary table on a device: it is no weight, and stays float32 whatever the weights are."""
        config = self.config
        self.rope = rope_table(config.head_size, config.context, config.rope_theta, device, config.rope_scaling)

    def tie(self) -> None:
        """The output projection reads the embedding's present weight, if it is tied to it."""
        if self.config.tied:
            self.output.weight = self.embedding.weight

    def checkpoint_activations(self, on: bool | Literal["selective"] = True) -> Self:
        """In training keep each block's input alone and compute the rest again in the backward pass: a third more
        arithmetic in the blocks for a fraction of their memory (arXiv 1604.06174). `selective` keeps the results of
        matrix products and attention too: hardly more arithmetic, half the memory (arXiv 2205.05198)."""
        for block in cast(Iterable[TransformerBlock], self.blocks):
            block.recompute = "products" if on == "selective" else "all" if on else "none"
        return self

    def share_rows(self, shared: SharedRows) -> Self:
        """Compute a part of every row alone from now on, where other processes compute the others: what it is given
        stays whole rows, what it gives (logits, losses, states) is of its part."""
        self.shared = shared
        for block in cast(Iterable[TransformerBlock], self.blocks):
            block.attention.attend = shared.attend
        return self

    def compile_blocks(self, **options: Any) -> Self:
        """torch.compile every block, in place: names and weights stay, and equal blocks share one compilation."""
        for block in self.blocks:
            block.compile(**options)
        self._compiled = True  # which would compile for each number of tokens of a document anew
        return self

    def initialize(self, seed: int) -> Transformer:
        """Fresh weights in place: see `initial_weights`."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in self.initial_weights(seed, self.embedding.weight.device):
                parameters[name].copy_(value)
        return self

    def initial_weights(self, seed: int, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Fresh float32 weights, a function of the seed (and the kind of device), one after the other, for a module
        that may be without memory.

        Matrices Normal(0, 0.02), as in GPT-2's code and in transformers' Llama and Chameleon (`initializer_range`);
        projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2, section 2.3 of its paper), so that its
        variance does not grow with depth; norms are 1, biases 0. The Chameleon paper names no initialization."""
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, device=device)
            if parameter.dim() < 2 or "norm" in name:
                yield name, value.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scaled = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if scaled else 0.02
                yield name, value.normal_(std=std, generator=generator)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        *,
        needed: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        z_loss: float = 0.0,
        normalizer: float = 1.0,
        image_weight: float = 1.0,
        measure: bool = False,
        scores: bool = False,
    ) -> Tensor | Loss:
        """LongTensor [B, T] -> FloatTensor [B, T, V] logits, float32; with `targets`, a Loss instead.

        Tokens and segments: see `hidden`. `needed`, LongTensor [B, P]: only the logits of these P tokens of each row,
        [B, P, V].
        Loss: `targets` LongTensor [B, T], `mask` BoolTensor [B, T], `image_mask` BoolTensor [V], z_loss, normalizer and
        image_weight as in ops/loss.py; no logits [B, T, V] exist on the way. `measure` fills its `stability`
        (ops/stability.py).
        With `scores` FloatTensor [B, T] instead: the log-probability of each target where `mask` is, 0 elsewhere.
        """
        rows_R = None
        if targets is not None:
            if mask is None or image_mask is None:
                raise ValueError("the loss needs targets, mask and image_mask")
            targets, mask = part_of(targets, self.shared), part_of(mask, self.shared)
            rows_R = trained_rows(mask)
        x_BTD, measured = self._trunk(tokens_BT, segments_BT, measure and rows_R is not None)
        if rows_R is None:
            if needed is not None:
                if self.shared is not None:
                    raise ValueError("of rows that processes share no tokens can be picked")
                x_BTD = x_BTD.gather(1, needed[..., None].expand(-1, -1, x_BTD.shape[-1]))
            return self.output(x_BTD)
        if scores:
            assert targets is not None
            scores_R = self.output(x_BTD, targets_BT=targets, rows_R=rows_R, scores=True)
            flat = scores_R.new_zeros(targets.numel()).index_put((rows_R,), scores_R)
            return flat.view(targets.shape)
        total, sums, measured_output = self.output(
            x_BTD,
            measure,
            targets_BT=targets,
            rows_R=rows_R,
            image_mask_V=image_mask,
            z_loss=z_loss,
            normalizer=normalizer,
            image_weight=image_weight,
        )
        return Loss(total, sums, stability.by_name(measured, measured_output))

    def hidden(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """LongTensor [B, T] -> FloatTensor [B, T, D], what the output projection reads.

        Causal attention over the T tokens, within documents (`segments_BT`, LongTensor [B, T]) if the configuration
        masks documents. Raises ValueError when there are more tokens than the context.
        """
        return self._trunk(tokens_BT, segments_BT, False)[0]

    def _trunk(self, tokens_BT: Tensor, segments_BT: Tensor | None, measure: bool) -> tuple[Tensor, list[Tensor]]:
        """`hidden`, and `stability.BLOCK` of every block where asked for."""
        T = tokens_BT.shape[1]
        mask: Mask = None
        if T > self.config.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.context}")
        rope_BTP2 = self.rope[None, :T]
        if segments_BT is not None and self.config.mask_documents:
            mask = document_mask(segments_BT, "dense" if self._compiled and not segments_BT.is_cuda else None)
        rope_BTP2, tokens_BT = part_of(rope_BTP2, self.shared), part_of(tokens_BT, self.shared)
        x_BTD, measured = self.embedding(tokens_BT), []
        for block in self.blocks:
            x_BTD, found = block(x_BTD, rope_BTP2, mask, measure)
            if found is not None:
                measured.append(found)
        return self.norm(x_BTD), measured
