from __future__ import annotations

import pytest

from mil_cli.device.host import Host


@pytest.fixture
def hosts() -> dict[str, Host]:
    """Return machines with different instruction sets."""
    sets = {
        "avx2": ("x86_64", {"sse4_2", "avx", "avx2"}),
        "vnni": ("x86_64", {"avx2", "avx512f", "avx512_vnni"}),
        "client_vnni": ("x86_64", {"avx2", "avx_vnni"}),
        "arm": ("aarch64", {"asimd", "asimddp"}),
        "bare": ("x86_64", set()),
    }
    return {
        name: Host(
            isa=frozenset(isa),
            processor=f"a {name} processor",
            architecture=architecture,
            cores=2,
            logical_cores=4,
            memory_bytes=8 * 10**9,
            packages={},
        )
        for name, (architecture, isa) in sets.items()
    }
