"""REALM in NumPy and float64, one row, head and token at a time.

Written from Guu et al. (2020), Devlin et al. (2019) and Lee et al. (2019); it shares no
code with the package but the names of the weights.
"""

from __future__ import annotations

import math

import numpy as np

CLS, SEP = 101, 102


def as_float64(tree):
    if isinstance(tree, dict):
        return {name: as_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def norm(x, p, epsilon):
    x = x - x.mean()
    return x / math.sqrt((x**2).mean() + epsilon) * p["scale"] + p["bias"]


def gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def log_softmax(x):
    top = max(x)
    return x - top - math.log(sum(math.exp(v - top) for v in x))


def bert(p, config, tokens, types=None):
    """Hidden states of one row without padding, a list of vectors."""
    types = [0] * len(tokens) if types is None else types
    e, eps = p["embeddings"], config.epsilon
    h = [
        norm(e["tokens"][token] + e["positions"][i] + e["segments"][s], e["norm"], eps)
        for i, (token, s) in enumerate(zip(tokens, types, strict=True))
    ]
    size = config.width // config.num_heads
    for layer in range(config.num_layers):
        w = {}
        for name, group in p["layers"].items():
            w[name] = {
                key: (
                    {n: leaf[layer] for n, leaf in value.items()}
                    if isinstance(value, dict)
                    else value[layer]
                )
                for key, value in group.items()
            }
        kernel, bias = w["attention"]["qkv"]["kernel"], w["attention"]["qkv"]["bias"]
        out = w["attention"]["output"]
        attended = []
        for i in range(len(h)):
            y = out["bias"].copy()
            for head in range(config.num_heads):
                q = h[i] @ kernel[:, 0, head] + bias[0, head]
                keys = [x @ kernel[:, 1, head] + bias[1, head] for x in h]
                values = [x @ kernel[:, 2, head] + bias[2, head] for x in h]
                a = np.exp(log_softmax(np.array([q @ k for k in keys]) / size**0.5))
                mixed = sum(a[j] * values[j] for j in range(len(h)))
                y = y + mixed @ out["kernel"][head]
            attended.append(norm(h[i] + y, w["attention_norm"], eps))
        h = []
        for x in attended:
            y = gelu(x @ w["up"]["kernel"] + w["up"]["bias"])
            y = y @ w["down"]["kernel"] + w["down"]["bias"]
            h.append(norm(x + y, w["output_norm"], eps))
    return h


def embed(p, config, tokens, types=None):
    """Embed(·), section 3.2."""
    h = bert(p["bert"], config, tokens, types)
    x = h[0] if config.pooling == "cls" else sum(h) / len(h)
    if config.pooler:
        x = np.tanh(x @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    if config.embed_dim:
        x = x @ p["projection"]["kernel"] + p["projection"]["bias"]
        if config.projection_norm:
            x = norm(x, p["projection_norm"], config.epsilon)
    return x / math.sqrt(x @ x) if config.normalise else x


def predict(p, config, tokens, types, place):
    """log p(· | z, x) at one place of the joint input."""
    x = bert(p["bert"], config, tokens, types)[place]
    x = gelu(x @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"])
    x = norm(x, p["head"]["norm"], config.epsilon)
    return log_softmax(p["bert"]["embeddings"]["tokens"] @ x + p["head"]["bias"])


def span_scores(p, config, tokens, types):
    """(start, end) → score of every span, end not included."""
    h = bert(p["bert"], config, tokens, types)
    kernel, bias = p["span_ends"]["kernel"], p["span_ends"]["bias"]
    scores = {}
    for start in range(len(h)):
        for end in range(start + 1, min(start + config.span_width, len(h)) + 1):
            x = h[start] @ kernel[:, 0] + bias[0] + h[end - 1] @ kernel[:, 1] + bias[1]
            x = norm(np.maximum(x, 0), p["span_norm"], 1e-3)
            score = x @ p["span_score"]["kernel"] + p["span_score"]["bias"]
            scores[start, end] = float(score[0])
    return scores


def candidates(batch, row):
    """(index, title, body) of the candidates that are there; the first is null."""
    for z in np.flatnonzero(batch["valid"][row]):
        title = batch["title"][row, z][: batch["title_len"][row, z]]
        body = batch["body"][row, z][: batch["body_len"][row, z]]
        yield int(z), list(title), list(body)


def example(params, config, batch, row):
    """log p(z | x) and log p(y_j | z, x) of one example, by candidate."""
    x = list(batch["query"][row][: batch["query_len"][row]])
    query = embed(params["query"], config, [CLS, *x, SEP])
    tower = params["query" if config.tied else "document"]
    masked = np.flatnonzero(batch["target_mask"][row])
    f, tokens = {}, {}
    for z, title, body in candidates(batch, row):
        document = [CLS, *title, SEP, *body, SEP] if z else [CLS, SEP]
        types = None
        if config.document_types:
            first = document.index(SEP) + 1
            types = [0] * first + [1] * (len(document) - first)
        f[z] = config.score_scale * (query @ embed(tower, config, document, types))
        joint = [CLS, *x, SEP, *body, SEP]
        types = [0] * (len(x) + 2) + [1] * (len(body) + 1)
        tokens[z] = [
            predict(
                params["encoder"],
                config,
                joint,
                types,
                batch["mask_positions"][row, j] + 1,
            )[batch["targets"][row, j]]
            for j in masked
        ]
    prior = dict(zip(f, log_softmax(np.array(list(f.values()))), strict=True))
    return prior, tokens


def log_likelihood(prior, tokens, form):
    """log p(y | x): with probabilities, no logarithms inside."""
    if form == "joint":
        total = 0.0
        for z in prior:
            product = math.exp(prior[z])
            for value in tokens[z]:
                product *= math.exp(value)
            total += product
        return math.log(total)
    result = 0.0
    for j in range(len(tokens[0])):
        result += math.log(
            sum(math.exp(prior[z]) * math.exp(tokens[z][j]) for z in prior)
        )
    return result
