"""What llama-eval-callback prints of tensors, in the forms that its versions have."""

import numpy as np

WIDE = " " * 37  # indent of the older versions


def printed(tensors, version, ids=(), digits=4):
    """tensors {name: array, ggml's ne reversed}; version: "old", "new" or "template"."""
    function = {
        "old": "ggml_debug",
        "new": "common_debug_cb_eval",
        "template": "common_debug_cb_eval<false>",
    }[version]
    step = 1 if version == "old" else 4
    lines = ["llama_context: n_ctx = 512", f"number of input tokens = {len(ids)}", *(f"  {i}" for i in ids)]
    for name, array in tensors.items():
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        kind = "f32" if array.dtype.kind == "f" else "i32"
        ne = ", ".join(str(n) for n in array.shape[::-1])
        lines.append(
            f"{function}: {name:>24} = ({kind})    MUL_MAT(w{{9, 9, 1, 1}}, x{{9, 2, 1, 1}}}}) = {{{ne}}}"
        )
        for block in array:
            lines += _block(block, WIDE if version == "old" else " " * 4, step, digits, version)
            lines.append(f"{WIDE}sum = {float(array.sum()):f}")
    return "\n".join(lines) + "\n"


def _block(block, indent, step, digits, version):
    lines = [f"{indent}["]
    for matrix in _corners(block):
        if matrix is None:
            lines.append(f"{indent}{' ' * step}..., ")
            continue
        lines.append(f"{indent}{' ' * step}[")
        for row in _corners(matrix):
            if row is None:
                lines.append(f"{indent}{' ' * 2 * step}..., ")
                continue
            numbers = ["..." if x is None else f"{float(x):12.{digits}f}" for x in _corners(row)]
            end = "  ]," if version != "old" else "],"
            lines.append(f"{indent}{' ' * 2 * step}[{', '.join(numbers)}{end}")
        lines.append(f"{indent}{' ' * step}],")
    return [*lines, f"{indent}]"]


def _corners(axis):
    """The first and the last three, with a None between where some are left out."""
    if len(axis) <= 6:
        return list(axis)
    return [*axis[:3], None, *axis[-3:]]


def rounded(array, digits=4):
    return np.round(np.asarray(array, np.float64), digits)
