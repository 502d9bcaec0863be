"""Strategies that damage files as disks, networks and attackers do."""

import copy
import json

from hypothesis import strategies as st


# Values that JSON can hold where a number, a name or a list was expected.
HOSTILE = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e300),
        *(float("nan"), float("inf"), float("-inf")),
        *("", "two", "1", "../../etc/passwd", "/dev/zero", "a\nb", "\x00", "os", "system", "x" * 10_000),
        *([], [[]], {}, [0] * 1000, ["os", "system"], ["builtins", "eval"], {"a": {}}, [None], [10**12]),
    ]
).map(copy.deepcopy)


@st.composite
def damaged_bytes(draw, content):
    """Up to three cuts, flips, overwrites, insertions and repetitions, as often in the head as anywhere."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(data), 400)) | st.integers(0, len(data)))
        size = draw(st.integers(1, 16))
        match draw(st.sampled_from(("cut", "flip", "overwrite", "insert", "repeat", "drop"))):
            case "cut":
                del data[at:]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=size))
            case "repeat":
                data[at:at] = data[at : at + 64 * size]
            case "drop":
                del data[at : at + size]
    return bytes(data)


def paths(value, path=()):
    """The path to every value in a JSON document, the document itself first."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += paths(child, (*path, key))
    return found


@st.composite
def damaged_json(draw, document):
    """A JSON document, one or two of whose values are replaced, removed or added, as text."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths(document)))
        if not path:
            document = draw(HOSTILE)
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(("replace", "replace", "remove", "add"))):
            case "replace":
                parent[path[-1]] = draw(HOSTILE)
            case "remove":
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = draw(HOSTILE)
    return json.dumps(document)
