"""Strategies for hypothesis: files that are nearly right, and files that are not."""

import gzip
import json
import lzma

from hypothesis import strategies as st

# What readers trip over when it stands in the wrong place.
TOKENS = [
    b"",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    "\u2028".encode(),
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1.5",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b'""',
    b'"\\ud800"',
    b'"a\\nb"',
    b"[]",
    b"{}",
    b"[",
    b"}",
    b"[" * 2000,
    b"../../etc/passwd",
]
numbers = st.one_of(
    st.integers(-2, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 1e308, 0.5]),
    st.floats(allow_nan=True),
)
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "a\nb", "\ud800", "\u2028", "../x", "/etc", "\0", "(", "a*"]),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)


def nested(depth):
    """A list within a list within … as JSON."""
    return b"[" * depth + b"]" * depth


@st.composite
def edited(draw, samples):
    """One of the samples with a few places cut, overwritten or repeated."""
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["flip", "put", "token", "cut", "repeat"]))
        if kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            data[start:end] = draw(st.binary(max_size=8))
        elif kind == "token":
            data[start:end] = draw(st.sampled_from(TOKENS))
        elif kind == "cut":
            del data[start:]
        else:
            data[start:start] = data[start:end] * draw(st.integers(1, 3))
    return bytes(data)


def files(*samples):
    """Any bytes, or nearly the samples."""
    return st.one_of(st.binary(max_size=200), edited(samples))


@st.composite
def records(draw, *samples):
    """Lines of JSON whose members hold anything; samples are objects."""
    lines = []
    for _ in range(draw(st.integers(0, 3))):
        record = dict(draw(st.sampled_from(samples)))
        for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=2)):
            record[name] = draw(json_values)
        if draw(st.booleans()):
            record.pop(draw(st.sampled_from(sorted(record))))
        lines.append(json.dumps(record, ensure_ascii=draw(st.booleans())))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    return end.join(lines).encode(errors="surrogatepass")


@st.composite
def compressed(draw, contents):
    """(suffix, file): plain, gzip or xz, and perhaps spoilt after that."""
    suffix = draw(st.sampled_from(["", "", ".gz", ".xz"]))
    content = draw(contents)
    # The default of xz takes 100 MB for a moment.
    packers = {"": bytes, ".gz": gzip.compress}
    packers[".xz"] = lambda data: lzma.compress(data, preset=0)
    packed = packers[suffix](content)
    if suffix and draw(st.booleans()):
        packed = draw(edited([packed]))
    return suffix, packed


@st.composite
def edited_json(draw, sample):
    """A JSON object in which something, however deep, is replaced, gone or added."""
    value = json.loads(json.dumps(sample))
    for _ in range(draw(st.integers(1, 2))):
        node, steps = value, draw(st.integers(0, 3))
        for _ in range(steps):
            inner = [x for x in _members(node) if isinstance(x, dict | list) and x]
            if not inner:
                break
            node = draw(st.sampled_from(inner))
        if isinstance(node, dict) and node:
            name = draw(st.sampled_from(sorted(node)))
            action = draw(st.sampled_from(["set", "drop", "rename"]))
            old = node.pop(name)
            if action == "set":
                node[name] = draw(json_values)
            elif action == "rename":
                node[draw(texts)] = old
        elif isinstance(node, list) and node:
            node[draw(st.integers(0, len(node) - 1))] = draw(json_values)
    return value


def _members(node):
    return node.values() if isinstance(node, dict) else node
