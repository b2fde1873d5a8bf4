"""Makes Triton's interpreter (3.6 to 3.9) right: bf16 arithmetic, rounding to nearest, loops under numpy 2.4, and memory checks.

The interpreter holds bf16 as raw 16-bit integers and computes on the bits; here every operation on bf16 goes through float32 and rounds
back to nearest even. Loads and stores outside every tensor argument, and two programs storing to one address (a race on a GPU, hidden by
running programs in turn), raise an error.
"""

import numpy as np


def install():
    """Patch the interpreter once; call before the first kernel launch."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_memzoo_installed", False):
        return
    interpreter._memzoo_installed = True
    _fix_loop_bounds(interpreter)
    _fix_bfloat16(interpreter)
    _guard_memory(interpreter)


def _fix_loop_bounds(interpreter):
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _fix_bfloat16(interpreter):
    import triton.language as tl

    builder, handle_type, bfloat16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16

    def is_bfloat16(value):
        return isinstance(value, handle_type) and value.dtype.scalar == bfloat16

    def widen(value):
        return handle_type((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bfloat16(value) else value

    def narrow(value):
        data = np.array(value.data, dtype=np.float32, ndmin=1)
        bits = data.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return handle_type(np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(np.shape(value.data)), bfloat16)

    def through_float32(name):
        original = getattr(builder, name)

        def patched(self, *args):
            if not any(map(is_bfloat16, args)):
                return original(self, *args)
            result = original(self, *map(widen, args))
            return narrow(result) if result.data.dtype.kind == "f" else result

        setattr(builder, name, patched)

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_fabs", "create_rsqrt", "create_erf"):
        if hasattr(builder, name):
            through_float32(name)

    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, d, *rest: dot(self, widen(a), widen(b), d, *rest)
    cast = builder.cast_impl

    def patched_cast(self, source, kind):
        if source.dtype.scalar == bfloat16 or kind.scalar == bfloat16:
            if source.dtype.scalar == kind.scalar:
                return source
            wide = widen(source)
            if kind.scalar == bfloat16:
                return narrow(handle_type(wide.data.astype(np.float32), tl.float32))
            return wide if kind.scalar == tl.float32 else cast(self, wide, kind)
        return cast(self, source, kind)

    builder.cast_impl = patched_cast
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: narrow(handle_type(np.array([value], np.float32), tl.float32))

    for operations in (interpreter.ReduceOps, interpreter.ScanOps):

        def patched_apply(self, given, _original=operations.apply_impl):
            parts = given if isinstance(given, tuple) else (given,)
            if not any(is_bfloat16(part.handle) for part in parts):
                return _original(self, given)
            parts = tuple(self.to_tensor(widen(p.handle).data, tl.float32) if is_bfloat16(p.handle) else p for p in parts)
            result = _original(self, parts if isinstance(given, tuple) else parts[0])

            def back(part):
                if part.handle.data.dtype.kind != "f":
                    return part
                kind = tl.block_type(bfloat16, part.type.shape) if part.type.is_block() else bfloat16
                return tl.core.tensor(narrow(part.handle), kind)

            return tuple(map(back, result)) if isinstance(result, (tuple, list)) else back(result)

        operations.apply_impl = patched_apply


def _guard_memory(interpreter):
    real, executor = interpreter._interpreter, interpreter.GridExecutor

    class Guard:
        starts, ends, owners = np.empty(0, np.uint64), np.empty(0, np.uint64), {}

        def __getattr__(self, name):
            return getattr(real, name)

        def check(self, what, pointers, mask, size):
            addresses = np.asarray(pointers, dtype=np.uint64)
            if mask is not None:
                addresses = np.broadcast_to(addresses, np.shape(mask))[np.asarray(mask, dtype=bool)]
            addresses = addresses.ravel()
            if addresses.size == 0 or self.starts.size == 0:
                return addresses
            index = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
            bad = (index < 0) | (addresses + np.uint64(size) > self.ends[np.clip(index, 0, None)])
            if bad.any():
                program = tuple(interpreter.interpreter_builder.grid_idx)
                raise IndexError(
                    f"{what}: {int(bad.sum())} of {addresses.size} addresses lie outside every argument; program {program}"
                )
            return addresses

        def load(self, pointers, mask, other, dtype):
            self.check("load", pointers, mask, np.dtype(dtype).itemsize)
            return real.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            addresses = self.check("store", pointers, mask, value.dtype.itemsize)
            program = tuple(interpreter.interpreter_builder.grid_idx)
            if np.unique(addresses).size != addresses.size:
                raise RuntimeError(f"store: one tl.store writes an address twice; program {program}")
            for address in addresses.tolist():
                owner = self.owners.setdefault(address, program)
                if owner != program:
                    raise RuntimeError(f"store race: programs {owner} and {program} write the same address")
            return real.store(pointers, value, mask)

    guard = interpreter._interpreter = Guard()

    def tensors_in(value):
        if hasattr(value, "untyped_storage"):
            yield value
        elif hasattr(value, "base") and hasattr(value.base, "untyped_storage"):
            yield value.base
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from tensors_in(item)

    original = executor._init_args_hst

    def patched(self, args, kwargs):
        result = original(self, args, kwargs)
        spans = []
        for value in [*result[0], *result[1].values()]:
            for tensor in tensors_in(value):
                if tensor.numel():
                    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                    spans.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
        merged = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        guard.starts = np.array([s for s, _ in merged], dtype=np.uint64)
        guard.ends = np.array([e for _, e in merged], dtype=np.uint64)
        guard.owners = {}
        return result

    executor._init_args_hst = patched
