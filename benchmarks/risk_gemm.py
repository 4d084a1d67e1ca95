"""How near to cuBLAS does a Triton product come on this GPU? y = xWᵀ and dx = dyW, bfloat16.

    cublas        torch.mm
    host          `gemm_ext` without the LoRA product, its descriptors made by the host
    host, r=16    the same with the LoRA product as a trailing chunk
    warps         descriptors made on the device, and warp specialisation: kept in this script only

Under 93 % of cuBLAS: stop tuning it, serve by shrink + `addmm_`, leave the product to CUDA.

    python benchmarks/risk_gemm.py
    python benchmarks/risk_gemm.py --warps      that variant alone, which might not return
"""

from functools import partial

import single
import torch
import triton
import triton.language as tl
from grids import shapes
from providers import by_triton
from torch import Tensor

SHAPES = "8192x4096x4096,8192x4096x14336,8192x14336x4096"
_TILE = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}


@triton.jit
def _warps(P, Q, Y, M, C, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           GROUP: tl.constexpr, Q_T: tl.constexpr):  # fmt: skip
    p_desc = tl.make_tensor_descriptor(P, [M, D], [D, 1], [BM, BK])
    if Q_T:
        q_desc = tl.make_tensor_descriptor(Q, [C, D], [D, 1], [BN, BK])
    else:
        q_desc = tl.make_tensor_descriptor(Q, [D, C], [C, 1], [BK, BN])
    y_desc = tl.make_tensor_descriptor(Y, [M, C], [C, 1], [BM, BN])
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(C, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
                         flatten=False, warp_specialize=True):  # fmt: skip
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        m = (first + tile % (GROUP * tiles_n) % height) * BM
        n = (tile % (GROUP * tiles_n) // height) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for d in range(0, D, BK):
            p = p_desc.load([m, d])
            q = q_desc.load([n, d]).T if Q_T else q_desc.load([d, n])  # Q_T is a constant
            acc = tl.dot(p, q, acc)
        y_desc.store([m, n], acc.to(tl.bfloat16))


def warps(p: Tensor, q: Tensor) -> Tensor:
    """p·q with four warps, which the compiler makes twelve."""
    y = p.new_empty(p.shape[0], q.shape[1])
    turned = q.stride(0) == 1
    (m, d), c = p.shape, q.shape[1]
    triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device="cuda"))
    programs = torch.cuda.get_device_properties(p.device).multi_processor_count
    tiles = triton.cdiv(m, _TILE["BM"]) * triton.cdiv(c, _TILE["BN"])
    _warps[(min(programs, tiles),)](
        p, q, y, m, c, d, Q_T=turned, num_warps=4, num_stages=3, **_TILE
    )
    return y


def with_chunk(p: Tensor, q: Tensor, h: Tensor, l: Tensor) -> Tensor:
    """p·q + h·l by `gemm_ext`."""
    from loradrop.op import fused

    return fused.by_triton(p, q, None, h, l, 1.0)


def main() -> None:
    args = single.arguments(__doc__, __file__, "warps")
    if args.warps:
        args.out = args.out.with_stem("risk_gemm_warps")
    rows: single.Rows = []
    for m, k, n in shapes(SHAPES):
        x, w, dy = single.normal(m, k), single.normal(n, k, k**-0.5), single.normal(m, n)
        for product, p, q in (("xWᵀ", x, w.T), ("dyW", dy, w)):
            h, l = single.normal(m, 16), single.normal(16, q.shape[1])
            calls = {"cublas": partial(torch.mm, p, q)}
            if args.warps:
                calls["warps"] = partial(warps, p, q)
            else:
                calls["host"] = partial(by_triton, p, q)
                calls["host, r=16"] = partial(with_chunk, p, q, h, l)
            sizes, found = {"M": m, "K": p.shape[1], "N": q.shape[1], "product": product}, []
            exact = p.double() @ q.double()
            for name in list(calls):
                chunk = name.endswith("r=16")
                wanted = exact + h.double() @ l.double() if chunk else exact
                plain = torch.mm(p, q) + torch.mm(h, l) if chunk else torch.mm(p, q)
                if fault := single.right(calls[name], wanted, plain):
                    found.append({**sizes, "variant": name, "fault": fault})
                    del calls[name]
            timings = single.timed(sizes, calls, args.seconds)
            base = single.first(timings, "cublas")
            rows += [row | {"of_cublas": base / row["median_us"]} for row in timings] + found
    single.finish(args, rows, "of_cublas", {})


if __name__ == "__main__":
    main()
