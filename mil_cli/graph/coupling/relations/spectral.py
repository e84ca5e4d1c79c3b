"""Fourier transforms, and complex numbers as pairs of reals."""

from __future__ import annotations

from mil_cli.graph.coupling.table import Operation, Rules, rules_for


def transform(operation: Operation) -> None:
    """Freeze the transformed axes; the others are transformed each by itself."""
    data, output = operation.input, operation.output
    given, rank = operation.value("dim"), operation.rank(data)
    if given is None:  # all axes, or as many of the last ones as sizes are given for
        sizes = operation.value("s") if operation.has("s") else None
        given = range(rank - len(sizes) if sizes else 0, rank)
    axes = {operation.axis(data, axis) for axis in ([given] if isinstance(given, int) else given)}
    for key in (data, output):
        operation.freeze(key, axes, f"{operation.name} over the axis")
    operation.link_all(data, output, but=axes)


def view_as_real(operation: Operation) -> None:
    """x(...) -> (..., 2): the real and the imaginary part."""
    data, output = operation.input, operation.output
    complex_, real = (data, output) if operation.name == "view_as_real" else (output, data)
    for axis in range(operation.rank(complex_)):
        operation.link(complex_, axis, real, axis)
    operation.freeze(real, -1, "the axis holds a real and an imaginary part")


RULES: Rules = {
    **rules_for(
        transform,
        *(f"fft_{kind}{axes}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for axes in ("", "2", "n")),
        "fft_fftshift",
        "fft_ifftshift",
    ),
    **rules_for(view_as_real, "view_as_real", "view_as_complex"),
}
