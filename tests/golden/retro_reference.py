"""RETRO in float64 NumPy, one equation at a time: slow, and nothing to get wrong.

Written from Borgeaud et al. 2022 (Algorithm 1, equations 2 to 4, 6 and 7, listing 1)
and from the conventions that the docstrings of `realm_retro` state where the paper is
silent. Everything is a loop over one sequence, one head, one query, one key; distances
are computed as written. From the implementation come only the names and shapes of its
parameters.

Symbols and their ranges are the paper's: tokens t in [1, n], chunks u in [1, l],
neighbours j in [1, k], i in [1, m] within an attending chunk, i' in [1, r] within a
neighbour. Arrays are indexed from 0, so each use of an index subtracts one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def forward(
    params: dict,
    config,
    tokens: Sequence[int],
    *,
    segments: Sequence[int] | None = None,
    neighbours: np.ndarray | None = None,
    neighbour_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Algorithm 1 for one sequence.

    Args:
      params: of `realm_retro.retro.model.Retro`, unboxed.
      config: m, L, P, L_enc, P_enc and the widths.
      tokens: X, n ids.
      segments: document of each token; attention stays inside a document.
      neighbours: RET(C_u)^j, ids [l, k, r]; None is RETRO[OFF] or the plain decoder.
      neighbour_mask: which of them are real, [l, k, r].

    Returns:
      O, logits [n, |V|].
    """
    params = as_float64(params)
    layers = decoder_layers(params)
    n, d = len(tokens), config.model_dim
    segments = [0] * n if segments is None else segments

    table = params["embed"]["table"]
    h = np.array([table[token] * math.sqrt(d) for token in tokens])
    encoded = None
    for p in range(1, config.num_layers + 1):
        layer = layers[p - 1]
        h = self_attention(layer["attention"], h, segments)
        if neighbours is not None:
            if p == min(config.cca_layers):
                if config.share_embedding:
                    inputs = table * math.sqrt(d) @ params["encoder"]["embed"]["kernel"]
                else:
                    own = params["encoder"]["embed"]["table"]
                    inputs = own * math.sqrt(config.encoder_dim)
                encoded = encode(
                    params["encoder"], config, inputs, neighbours, neighbour_mask, h
                )
            if p in config.cca_layers:
                h = h + chunked_cross_attention(
                    layer["cross"]["attention"],
                    norm(layer["cross"]["norm"], h),
                    encoded,
                    config.chunk_length,
                )
        h = feed_forward(layer["ffw"]["norm"], layer["ffw"]["ffw"], h)
    return np.array([table @ x for x in norm(params["norm"], h)])


def loss(logits: np.ndarray, targets: Sequence[int], mask: Sequence[bool]) -> float:
    """Mean over the masked-in targets of −log p(target), in nats."""
    total, count = 0.0, 0
    for row, target, counts in zip(logits, targets, mask, strict=True):
        if counts:
            top = max(row)
            total += top + math.log(sum(math.exp(x - top) for x in row)) - row[target]
            count += 1
    return total / count


# A real token of a neighbour: its place i' in the neighbour, and its encoding.
Encoded = list[list[list[tuple[int, np.ndarray]]]]  # [u][j] → real tokens


def encode(
    params: dict,
    config,
    inputs: np.ndarray,
    neighbours: np.ndarray,
    mask: np.ndarray,
    h: np.ndarray,
) -> Encoded:
    """ENCODER(RET(C_u), H) of Algorithm 1.

    Padding is not there: neither encoded nor attended to.

    Args:
      params: of the encoder.
      config: m, L_enc, P_enc and d'.
      inputs: what the encoder reads for each token of the vocabulary, [|V|, d'].
      neighbours: ids [l, k, r].
      mask: real tokens [l, k, r].
      h: the decoder's activations after self-attention at layer min(P), [n, d].
    """
    m, width = config.chunk_length, config.encoder_dim
    encoded: Encoded = []
    for u in range(1, len(neighbours) + 1):
        h_u = [h[(u - 1) * m + i - 1] for i in range(1, m + 1)]
        encoded.append([])
        for ids, real in zip(neighbours[u - 1], mask[u - 1], strict=True):
            places = [place for place in range(1, len(ids) + 1) if real[place - 1]]
            e = np.array([inputs[ids[place - 1]] for place in places])
            e = e.reshape(len(places), width)
            for p in range(1, config.encoder_layers + 1):
                layer = params[f"layer_{p}"]
                e = e + attend(
                    layer["attention"],
                    queries=norm(layer["attention_norm"], e),
                    keys=norm(layer["attention_norm"], e),
                    distance=lambda a, b, at=places: at[a] - at[b],
                    visible=lambda a, b: True,
                )
                if p in config.encoder_ca_layers:
                    e = e + attend(
                        layer["cross"],
                        queries=norm(layer["cross_norm"], e),
                        keys=norm(layer["chunk_norm"], np.array(h_u)),
                        # Equation 7: d_enc(i', i) = i' − i, with i' and i from 1.
                        distance=lambda a, b, at=places: at[a] - (b + 1),
                        visible=lambda a, b: True,
                    )
                e = feed_forward(layer["ffw_norm"], layer["ffw"], e)
            e = norm(params["norm"], e)
            encoded[-1].append(list(zip(places, e, strict=True)))
    return encoded


def chunked_cross_attention(
    params: dict, h: np.ndarray, encoded: Encoded, m: int
) -> np.ndarray:
    """CCA(H, E) without its residual: equation 3, for each u and each i in [1, m].

    Args:
      params: of the attention.
      h: normed activations [n, d].
      encoded: E.
      m: tokens of a chunk.
    """
    n = len(h)
    out = np.zeros((n, params["output"]["kernel"].shape[-1]))
    for u in range(1, len(encoded) + 1):
        # "Attention is computed across time and across neighbours simultaneously."
        merged = [token for neighbour in encoded[u - 1] for token in neighbour]
        places = [place for place, _ in merged]
        for i in range(1, m + 1):
            t = u * m + i - 1
            if t > n:
                break
            out[t - 1] = attend(
                params,
                queries=h[t - 1][None, :],
                keys=[encoding for _, encoding in merged],
                # Equation 6: d(i, i') = i − i' + m − 1.
                distance=lambda a, b, i=i, at=places: i - at[b] + m - 1,
                visible=lambda a, b: True,
            )[0]
    return out


def self_attention(params: dict, h: np.ndarray, segments: Sequence[int]) -> np.ndarray:
    """ATTN(H), with its residual: causal, and within a document."""
    x = norm(params["norm"], h)
    return h + attend(
        params["attention"],
        queries=x,
        keys=x,
        distance=lambda i, j: i - j,
        visible=lambda i, j: j <= i and segments[i] == segments[j],
    )


def attend(
    params: dict,
    *,
    queries: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
    distance: Callable[[int, int], int],
    visible: Callable[[int, int], bool],
) -> np.ndarray:
    """CA of equation 4, with heads and Transformer-XL's positional logits.

        logit(i, i') = ((q_i + u) · k_i' + (q_i + v) · W s(d(i, i'))) / √head size

    A query that sees no key gives zero.
    """
    num_heads, head_dim, width = params["output"]["kernel"].shape
    out = np.zeros((len(queries), width))
    positional: dict[int, np.ndarray] = {}
    for head in range(num_heads):
        w_q, w_k, w_v, w_r = (
            params[name]["kernel"][:, head]
            for name in ("query", "key", "value", "position")
        )
        w_o = params["output"]["kernel"][head]
        bias_u, bias_v = params["content_bias"][head], params["position_bias"][head]
        projected = [(key @ w_k, key @ w_v) for key in keys]
        positional.clear()
        for i, query in enumerate(queries):
            q = query @ w_q
            seen, logits = [], []
            for j, (k, v) in enumerate(projected):
                if not visible(i, j):
                    continue
                d = distance(i, j)
                if d not in positional:
                    positional[d] = sinusoid(d, w_r.shape[0]) @ w_r
                content, position = (q + bias_u) @ k, (q + bias_v) @ positional[d]
                logits.append((content + position) / math.sqrt(head_dim))
                seen.append(v)
            if seen:
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                mixed = sum(a * v for a, v in zip(weights, seen, strict=True))
                out[i] += (mixed / sum(weights)) @ w_o
    return out


def sinusoid(d: int, width: int) -> np.ndarray:
    """s(d): sin(d f_0), sin(d f_1), …, then the cosines; f_j = 10000^(−2 j / width)."""
    angles = [d * 10_000.0 ** (-2 * j / width) for j in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def norm(params: dict, h: np.ndarray) -> np.ndarray:
    """RMSNorm of each row."""
    rows = [x / math.sqrt(np.mean(x * x) + 1e-6) * params["scale"] for x in h]
    return np.array(rows).reshape(h.shape)


def feed_forward(norm_params: dict, params: dict, h: np.ndarray) -> np.ndarray:
    """FFW(H), with its residual; GELU in its tanh form."""

    def gelu(x: np.ndarray) -> np.ndarray:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + np.tanh(inner))

    up, down = params["up"]["kernel"], params["down"]["kernel"]
    rows = [gelu(x @ up) @ down for x in norm(norm_params, h)]
    return h + np.array(rows).reshape(h.shape)


def decoder_layers(params: dict) -> list[dict]:
    """Parameters of layers 1 … L, each with ``attention``, ``ffw``, perhaps ``cross``.

    Layers that the implementation scans are stacked along the first axis.
    """
    layers: list[dict] = []

    def unstack(run: dict) -> None:
        units = len(run[next(iter(run))]["ffw"]["norm"]["scale"])
        plain = sum(name.startswith("plain_") for name in run)
        for unit in range(units):
            names = [f"plain_{i}" for i in range(plain)]
            for name in names + (["cca"] if "cca" in run else []):
                layers.append(_at(run[name], unit))

    if "stem" in params:
        unstack(params["stem"])
    if "bridge_attention" in params:
        layers.append({x: params[f"bridge_{x}"] for x in ("attention", "cross", "ffw")})
    group = 0
    while f"groups_{group}" in params:
        unstack(params[f"groups_{group}"])
        group += 1
    if "tail" in params:
        unstack(params["tail"])
    return layers


def _at(tree: dict, row: int) -> dict:
    if isinstance(tree, dict):
        return {name: _at(branch, row) for name, branch in tree.items()}
    return tree[row]


def as_float64(tree: dict) -> dict:
    """The same parameters as float64 NumPy arrays."""
    if isinstance(tree, dict):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)
