"""Vectors of 16 floats inside Numba kernels, and how such kernels are compiled and cached.

A vector is a Numba type over portable LLVM IR: load, store, broadcast, fma, exp2, softplus, a 16x16 transpose
in registers, and the operators + - *. Memory is float32, or bfloat16 seen as uint16, which `load` and
`scalar` widen. The module imports numba and is itself imported only by the kernels.
"""

import hashlib
import inspect
import logging
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import lower_builtin, models, register_model, type_callable

_log = logging.getLogger(__name__)
# What it returns is called in kernels, without the typing context that its argument takes.
intrinsic: Any = extending.intrinsic

# A processor to compile for, the features that it must have, and how many floats fit into one of its
# registers, into which LLVM splits vectors of 16.
_INSTRUCTION_SETS = {
    "avx512": ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"), 16),
    "avx2": ("x86-64-v3", ("avx2", "fma", "bmi2", "f16c"), 8),
    "sse4.2": ("x86-64-v2", ("sse4.2", "ssse3", "popcnt"), 4),
}


def _target() -> Any:
    return cpu_target.target_context


def instruction_set() -> tuple[str, int]:
    """The instructions that kernels are compiled for, and the floats in one register: ("avx512", 16).

    The widest that the processor has, or what MAMBASTYLE_CPU_FEATURES (avx512, avx2 or sse4.2) limits it to.
    On other processors it is ("native", 4): LLVM knows best, and NEON has four.
    """
    _, _, features = _target().codegen().magic_tuple()
    present = set(features.split(","))
    for name, (_, needed, lanes) in _INSTRUCTION_SETS.items():
        if {f"+{feature}" for feature in needed} <= present:
            return name, lanes
    return "native", 4


def _limit_instructions(wanted: str) -> None:
    """Makes Numba compile for an older processor than this one. It has one target for the whole process."""
    if wanted not in _INSTRUCTION_SETS:
        raise ValueError(
            f"MAMBASTYLE_CPU_FEATURES must be one of {', '.join(_INSTRUCTION_SETS)}: got {wanted!r}"
        )
    processor, needed, _ = _INSTRUCTION_SETS[wanted]
    host = llvm.get_host_cpu_features()
    if missing := [feature for feature in needed if not host.get(feature)]:
        raise ValueError(
            f"MAMBASTYLE_CPU_FEATURES={wanted} needs {', '.join(missing)}, "
            "which this processor lacks: unset it"
        )
    # All that older sets have, and nothing else, so that the result is that of such a processor.
    names = list(_INSTRUCTION_SETS)
    older = names[names.index(wanted) :]
    features = ",".join(f"+{feature}" for name in older for feature in _INSTRUCTION_SETS[name][1])
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = processor, features  # type: ignore
    if _target().codegen().magic_tuple()[2] != features:
        raise RuntimeError(
            "MAMBASTYLE_CPU_FEATURES came too late: Numba has compiled in this process already; use the scan "
            "before other Numba code, or set NUMBA_CPU_NAME and NUMBA_CPU_FEATURES"
        )


if _wanted := os.environ.get("MAMBASTYLE_CPU_FEATURES"):
    _limit_instructions(_wanted)

LANES = 16
STATES = 4  # computed together: as many as leave their A, h and gradients in registers
WIDTH = instruction_set()[1]  # floats in a register
QUARTER = 4  # lanes that every processor shuffles among themselves at the least cost

# ------------------------------------------------------------------------------------------------------------
# Types for Numba: a vector of 16 floats and four of them (a quad, for four states), which LLVM splits where
# registers are shorter (AVX2, SSE, NEON); and for rows of memory what fills a register, and four of those.

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_HALF = ir.IntType(16)
_HALVES = ir.VectorType(_HALF, LANES)

# exp2(r) on [-1/2, 1/2], highest power first: the polynomial of least relative error (9.1e-8, by linear
# programming) among those whose last coefficient is exactly 1. A step size near zero must keep the state as
# it is, or the error grows with the length of the memory.
_EXP2 = (
    0.0013264723231644802,
    0.009671512614646473,
    0.05550733755230193,
    0.2402224208606418,
    0.693146977594682,
    1.0,
)
# log(1 + e) / e on [0, 1], highest power first.
_LOG1P = (
    0.0052326932508425655,
    -0.029505243262125086,
    0.07822597556073553,
    -0.1366324951578318,
    0.1910600956772305,
    -0.24842983320740317,
    0.33319097028590217,
    -0.4999949315974462,
    0.9999999698843781,
)
LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)


class _RegisterType(types.Type):
    """A value that lives in registers: a vector of floats, or `count` of them."""

    def __init__(self, lanes: int, count: int = 1) -> None:
        super().__init__(name=f"float32x{lanes}" + (f"x{count}" if count > 1 else ""))
        self.lanes, self.count = lanes, count
        vector = ir.VectorType(_FLOAT, lanes)
        self.llvm_type = vector if count == 1 else ir.ArrayType(vector, count)


_vector = _RegisterType(LANES)
_quad = _RegisterType(LANES, STATES)
_row = _RegisterType(WIDTH)
_rows = _RegisterType(WIDTH, STATES)


@register_model(_RegisterType)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, frontend_type.llvm_type)


def _floats(like: Any, value: float) -> ir.Constant:
    """As many as a vector has, all of them `value`."""
    return ir.Constant(like.type, [ir.Constant(_FLOAT, value)] * like.type.count)


def _ints(count: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, count), [ir.Constant(_INT, value)] * count)


def _as_ints(builder: Any, x: Any) -> Any:
    return builder.bitcast(x, ir.VectorType(_INT, x.type.count))


def _undefined(lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)


def _lane_order(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(lanes)), [ir.Constant(_INT, lane) for lane in lanes])


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, address: Any, vector: ir.Type = _FLOATS) -> Any:
    loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=4)


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    first = builder.insert_element(_undefined(lanes), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, _undefined(lanes), _ints(lanes, 0))


def _call(builder: Any, name: str, *values: Any) -> Any:
    """Calls an LLVM intrinsic on vectors."""
    vector = values[0].type
    function_type = ir.FunctionType(vector, [vector] * len(values))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"{name}.v{vector.count}f32")
    return builder.call(function, values)


def _join(builder: Any, vectors: list[Any]) -> Any:
    quad = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for number, vector in enumerate(vectors):
        quad = builder.insert_value(quad, vector, number)
    return quad


def _split(builder: Any, value: Any) -> list[Any]:
    """The four vectors of a quad; a vector stands for four equal ones."""
    if isinstance(value.type, ir.VectorType):
        return [value] * STATES
    return [builder.extract_value(value, number) for number in range(STATES)]


def _each(builder: Any, result: Any, operation: Callable[..., Any], arguments: Any) -> Any:
    """The operation on vectors, or on each vector of the quads if the result is a quad."""
    if result.count == 1:
        return operation(*arguments)
    split = [_split(builder, argument) for argument in arguments]
    return _join(builder, [operation(*vectors) for vectors in zip(*split, strict=True)])


def _widest(*arguments: Any) -> Any:
    """The Numba type of an operation on vectors and quads, None for other types and different lengths."""
    if not all(isinstance(argument, _RegisterType) for argument in arguments):
        return None
    if len({argument.lanes for argument in arguments}) > 1:
        return None
    return max(arguments, key=lambda argument: argument.count)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fmuladd", x, y, z)


# What takes many instructions works on vectors side by side, one instruction for each of them at a time: in a
# chain of dependent ones a processor waits for the last.


def _polynomial(builder: Any, coefficients: tuple[float, ...], vectors: list[Any]) -> list[Any]:
    values = [_floats(vectors[0], coefficients[0])] * len(vectors)
    for coefficient in coefficients[1:]:
        addend = _floats(vectors[0], coefficient)
        values = [_fma(builder, value, x, addend) for value, x in zip(values, vectors, strict=True)]
    return values


def _short_polynomial(builder: Any, coefficients: tuple[float, ...], vectors: list[Any]) -> list[Any]:
    """The same by Estrin's scheme: a few more products, and half as many steps that wait for the one before.

    It pays for a vector by itself, in registers of which there are too few to work on several; the last
    coefficient is rounded once more.
    """
    if WIDTH == LANES:
        return _polynomial(builder, coefficients, vectors)
    terms = [[_floats(vectors[0], coefficient)] * len(vectors) for coefficient in reversed(coefficients)]
    powers = vectors

    def joined(low: list[Any], high: list[Any]) -> list[Any]:
        return [_fma(builder, *parts) for parts in zip(high, powers, low, strict=True)]

    while len(terms) > 3:
        pairs = [joined(*pair) for pair in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
        powers = [builder.fmul(x, x) for x in powers]
    while len(terms) > 1:
        terms = [*terms[:-2], joined(*terms[-2:])]
    return terms[0]


def _limit(builder: Any, comparison: str, bound: float, vectors: list[Any]) -> list[Any]:
    """At least the bound (comparison ">"), or at most ("<")."""
    limit = _floats(vectors[0], bound)
    # This order of comparison keeps NaN, and is one machine instruction.
    return [builder.select(builder.fcmp_ordered(comparison, limit, x), limit, x) for x in vectors]


def _exp2(builder: Any, vectors: list[Any], polynomial: Callable[..., list[Any]] = _polynomial) -> list[Any]:
    """2 ** x for x <= 128 with a relative error of 2e-7.

    Below the normal range it is exact with AVX-512 and 2 ** -126 without. Beyond 128 it is anything.
    """
    if instruction_set()[0] == "avx512":
        wholes = [_call(builder, "llvm.rint", x) for x in vectors]
        parts = [builder.fsub(x, whole) for x, whole in zip(vectors, wholes, strict=True)]
        mantissas = polynomial(builder, _EXP2, parts)
        scale = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS, ir.IntType(16), _INT]),
            "llvm.x86.avx512.mask.scalef.ps.512",
        )
        how = ir.Constant(ir.IntType(16), -1), ir.Constant(_INT, 4)  # all lanes, the current rounding
        pairs = zip(mantissas, wholes, strict=True)
        return [builder.call(scale, [mantissa, whole, mantissa, *how]) for mantissa, whole in pairs]
    # Adding 1.5 * 2 ** 23 rounds to a whole number and leaves it in the low bits; shifted into the exponent,
    # it scales. At 128 the mantissa is exactly 1 and the exponent all ones: infinity, as it should be.
    vectors = _limit(builder, ">", -126.0, vectors)
    rounding = _floats(vectors[0], 12582912.0)
    shifted = [builder.fadd(x, rounding) for x in vectors]
    wholes = [builder.fsub(x, rounding) for x in shifted]
    parts = [builder.fsub(x, whole) for x, whole in zip(vectors, wholes, strict=True)]
    mantissas = [_as_ints(builder, x) for x in polynomial(builder, _EXP2, parts)]
    exponents = [builder.shl(_as_ints(builder, x), _ints(x.type.count, 23)) for x in shifted]
    scaled = [builder.add(*pair) for pair in zip(mantissas, exponents, strict=True)]
    return [builder.bitcast(x, vectors[0].type) for x in scaled]


def _exp2_or_inf(builder: Any, vectors: list[Any]) -> list[Any]:
    """2 ** x, infinite above the range of float32."""
    # AVX-512's instruction does so by itself.
    limited = vectors if instruction_set()[0] == "avx512" else _limit(builder, "<", 128.0, vectors)
    return _exp2(builder, limited)


def _exp_minus_abs(
    builder: Any, vectors: list[Any], polynomial: Callable[..., list[Any]] = _polynomial
) -> list[Any]:
    magnitudes = [builder.and_(_as_ints(builder, x), _ints(x.type.count, 0x7FFFFFFF)) for x in vectors]
    factor = _floats(vectors[0], -float(LOG2_E))
    exponents = [builder.fmul(builder.bitcast(x, factor.type), factor) for x in magnitudes]
    return _exp2(builder, exponents, polynomial)


def _softplus(builder: Any, vectors: list[Any]) -> list[Any]:
    e = _exp_minus_abs(builder, vectors, _short_polynomial)
    return _softplus_from(builder, vectors, e, _short_polynomial)


def _softplus_from(
    builder: Any, vectors: list[Any], e: list[Any], polynomial: Callable[..., list[Any]] = _polynomial
) -> list[Any]:
    logarithms = polynomial(builder, _LOG1P, e)
    return [
        _fma(builder, *parts) for parts in zip(logarithms, e, _limit(builder, ">", 0.0, vectors), strict=True)
    ]


def _logistic(builder: Any, vectors: list[Any]) -> list[Any]:
    one, zero = (_floats(vectors[0], value) for value in (1.0, 0.0))
    return [
        builder.fdiv(
            builder.select(builder.fcmp_ordered(">", x, zero), one, e),
            builder.fadd(one, e),
        )
        for x, e in zip(vectors, _exp_minus_abs(builder, vectors, _short_polynomial), strict=True)
    ]


def _register_operator(function: Any, instruction: str) -> None:
    @type_callable(function)
    def _type(context: Any) -> Any:
        return lambda x, y: _widest(x, y)

    @lower_builtin(function, _RegisterType, _RegisterType)
    def _lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _each(builder, signature.return_type, getattr(builder, instruction), arguments)


for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _register_operator(_function, _instruction)


@intrinsic
def load(typing_context, array, index):  # type: ignore  # the arguments are Numba types
    """array[index : index + 16], of float32 or of bfloat16 seen as uint16."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        if signature.args[0].dtype == types.float32:
            return _load(builder, address)
        halves = builder.load(builder.bitcast(address, _HALVES.as_pointer()))
        halves.align = 2
        return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _ints(LANES, 16)), _FLOATS)

    return _vector(array, types.intp), generate


@intrinsic
def load_states(typing_context, array, index):  # type: ignore
    """array[index : index + 64], four states of 16 channels."""

    def generate(context, builder, signature, arguments):
        array, index = arguments
        starts = [builder.add(index, ir.Constant(index.type, number * LANES)) for number in range(STATES)]
        addresses = [_address(context, builder, signature.args[0], array, start) for start in starts]
        return _join(builder, [_load(builder, address) for address in addresses])

    return _quad(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, value):  # type: ignore
    """array[index : index + 16, 64 or WIDTH] = value, a vector, a quad or a row."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        vectors = [value] if signature.args[2].count == 1 else _split(builder, value)
        for number, vector in enumerate(vectors):
            start = builder.add(index, ir.Constant(index.type, number * LANES))
            _store(builder, vector, _address(context, builder, signature.args[0], array, start))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def broadcast(typing_context, array, index):  # type: ignore
    """array[index] in every lane."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, builder.load(_address(context, builder, signature.args[0], *arguments)))

    return _vector(array, types.intp), generate


@intrinsic
def broadcast_states(typing_context, array, index):  # type: ignore
    """array[index : index + 4], each in every lane of its vector."""

    def generate(context, builder, signature, arguments):
        array, index = arguments
        indices = [builder.add(index, ir.Constant(index.type, number)) for number in range(STATES)]
        addresses = [_address(context, builder, signature.args[0], array, i) for i in indices]
        return _join(builder, [_splat(builder, builder.load(address)) for address in addresses])

    return _quad(array, types.intp), generate


@intrinsic
def address(typing_context, array):  # type: ignore
    """Where the array begins in memory, in bytes."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, *arguments).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), generate


@intrinsic
def _pointer(typing_context, address):  # type: ignore
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.intp), generate


@intrinsic
def prefetch(typing_context, address):  # type: ignore
    """Asks for the line of memory at an address, even one that is not the program's, and does not wait."""

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        # To be read (0), kept as near as can be (3), data (1).
        how = [ir.Constant(_INT, value) for value in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], byte), *how])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def scalar(typing_context, array, index):  # type: ignore
    """array[index] as float32, from float32 or from bfloat16 seen as uint16."""

    def generate(context, builder, signature, arguments):
        value = builder.load(_address(context, builder, signature.args[0], *arguments))
        if signature.args[0].dtype == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _INT), ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(array, types.intp), generate


@intrinsic
def splat(typing_context, value):  # type: ignore
    """One float32 in every lane."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return _vector(types.float32), generate


@intrinsic
def fma(typing_context, x, y, z):  # type: ignore
    """x * y + z, in one rounding where the machine has it."""

    def generate(context, builder, signature, arguments):
        return _each(builder, signature.return_type, lambda *xyz: _fma(builder, *xyz), arguments)

    return _widest(x, y, z)(x, y, z), generate


@intrinsic
def dot_states(typing_context, x, y, start):  # type: ignore
    """start + the sum of x * y over the four states: a vector."""

    def generate(context, builder, signature, arguments):
        x, y, total = arguments
        for pair in zip(_split(builder, x), _split(builder, y), strict=True):
            total = _fma(builder, *pair, total)
        return total

    return _vector(_quad, _quad, _vector), generate


def _of_each(operation: Callable[[Any, list[Any]], list[Any]], x: Any) -> Any:
    """The signature and the code of an operation on a vector, or on four side by side."""

    def generate(context, builder, signature, arguments):
        if signature.return_type.count == 1:
            return operation(builder, arguments)[0]
        return _join(builder, operation(builder, _split(builder, arguments[0])))

    return _widest(x)(x), generate


@intrinsic
def exp2(typing_context, x):  # type: ignore
    return _of_each(_exp2_or_inf, x)


@intrinsic
def exp2_to_128(typing_context, x):  # type: ignore
    """`exp2` of what is known to be at most 128; of anything else it is anything."""
    return _of_each(_exp2, x)


@intrinsic
def softplus(typing_context, x):  # type: ignore
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), which overflows nowhere."""
    return _of_each(_softplus, x)


@intrinsic
def exp_minus_abs(typing_context, x):  # type: ignore
    """exp(-|x|)."""
    return _of_each(_exp_minus_abs, x)


@intrinsic
def softplus_from(typing_context, rows, e):  # type: ignore
    """`softplus` of rows with their e = exp(-|x|): the halves' constants are too many for one loop."""

    def generate(context, builder, signature, arguments):
        rows, e = (_split(builder, argument) for argument in arguments)
        return _join(builder, _softplus_from(builder, rows, e))

    return _rows(_rows, _rows), generate


@intrinsic
def logistic(typing_context, x):  # type: ignore
    """1 / (1 + exp(-x)), the slope of softplus: (1 or e) / (1 + e) with e = exp(-|x|)."""
    return _of_each(_logistic, x)


def _fold(builder: Any, rows: list[Any], distance: int, until: int) -> list[Any]:
    """Rounds that halve the number of rows. Each adds what two rows have `distance` apart, puts the sums side
    by side and goes on with half the distance; the last one's is `until`.
    """
    lanes = range(LANES)
    while distance >= until:
        # Lanes without the bit come from the row without it.
        own = _lane_order([c if not c & distance else LANES + c for c in lanes])
        other = _lane_order([c | distance if not c & distance else LANES + (c ^ distance) for c in lanes])
        half = len(rows) // 2
        rows = [
            builder.fadd(builder.shuffle_vector(x, y, own), builder.shuffle_vector(x, y, other))
            for x, y in zip(rows[:half], rows[half:], strict=True)
        ]
        distance //= 2
    return rows


def _load_rows(context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int) -> list[Any]:
    starts = [builder.add(index, ir.Constant(index.type, row * LANES)) for row in range(count)]
    return [_load(builder, _address(context, builder, array_type, array, start)) for start in starts]


@intrinsic
def fold_states(typing_context, quad):  # type: ignore
    """One vector of four: its lanes 4 n to 4 n + 3 add up to what the 16 lanes of state n do.

    Less work than to sum each, and a quarter of the memory of keeping all.
    """

    def generate(context, builder, signature, arguments):
        (folded,) = _fold(builder, _split(builder, arguments[0]), LANES // 2, STATES)
        return folded

    return _vector(_quad), generate


@intrinsic
def sum_folded(typing_context, array, index):  # type: ignore
    """The sums of array[index + 4 r : index + 4 r + 4] for r in 0..15, a vector: what `fold_states` began."""

    def generate(context, builder, signature, arguments):
        array, index = arguments
        rows = _load_rows(context, builder, signature.args[0], array, index, STATES)
        (sums,) = _fold(builder, rows, STATES // 2, 1)
        # Lane 4 n + k holds state n of row k.
        order = _lane_order([STATES * (c % STATES) + c // STATES for c in range(LANES)])
        return builder.shuffle_vector(sums, _undefined(LANES), order)

    return _vector(array, types.intp), generate


@intrinsic
def sum_rows(typing_context, array, index):  # type: ignore
    """The sums of array[index + 16 r : index + 16 r + 16] for r in 0..15, a vector.

    Four rounds halve the number of vectors, a third of the work of sixteen separate sums.
    """

    def generate(context, builder, signature, arguments):
        array, index = arguments
        rows = _load_rows(context, builder, signature.args[0], array, index, LANES)
        (sums,) = _fold(builder, rows, LANES // 2, 1)
        return sums

    return _vector(array, types.intp), generate


@intrinsic
def transpose(typing_context, source, start, row_step, target, target_start, target_row_step):  # type: ignore
    """target[target_start + c * target_row_step + r] = source[start + r * row_step + c] for r, c in 0..15.

    By squares that fit into the registers, each in rounds of exchanging halves (Eklundh): in each, rows k and
    k + d swap blocks of d lanes.
    """

    def generate(context, builder, signature, arguments):
        source, start, row_step, target, target_start, target_row_step = arguments
        side, vector = WIDTH, _row.llvm_type

        def at(array_type, array, first, step, row, column):
            index = builder.add(first, builder.mul(step, ir.Constant(step.type, row)))
            index = builder.add(index, ir.Constant(index.type, column))
            return _address(context, builder, array_type, array, index)

        def square(top, left):
            places = [(top + r, left) for r in range(side)]
            rows = [at(signature.args[0], source, start, row_step, *place) for place in places]
            rows = [_load(builder, row, vector) for row in rows]
            distance = side // 2
            while distance:
                low = _lane_order([c if not c & distance else side + (c ^ distance) for c in range(side)])
                high = _lane_order([c | distance if not c & distance else side + c for c in range(side)])
                for upper in (r for r in range(side) if not r & distance):
                    pair = rows[upper], rows[upper + distance]
                    rows[upper] = builder.shuffle_vector(*pair, low)
                    rows[upper + distance] = builder.shuffle_vector(*pair, high)
                distance //= 2
            for c, value in enumerate(rows):
                address = at(signature.args[3], target, target_start, target_row_step, left + c, top)
                _store(builder, value, address)

        for top in range(0, LANES, side):
            for left in range(0, LANES, side):
                square(top, left)
        return context.get_dummy_value()

    return types.void(source, *[types.intp] * 2, target, *[types.intp] * 2), generate


# ------------------------------------------------------------------------------------------------------------
# Four rows of memory with time in the lanes: a register of each.


@intrinsic
def load_row(typing_context, array, place):  # type: ignore
    """array[place : place + WIDTH]."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return _load(builder, address, _row.llvm_type)

    return _row(array, types.intp), generate


@intrinsic
def load_rows(typing_context, array, first, second, third, fourth):  # type: ignore
    """What lies at four places."""

    def generate(context, builder, signature, arguments):
        array, *places = arguments
        addresses = [_address(context, builder, signature.args[0], array, place) for place in places]
        return _join(builder, [_load(builder, address, _row.llvm_type) for address in addresses])

    return _rows(array, *[types.intp] * STATES), generate


@intrinsic
def broadcast_rows(typing_context, array, first, second, third, fourth):  # type: ignore
    """The floats at four places, each in every lane of its row."""

    def generate(context, builder, signature, arguments):
        array, *places = arguments
        addresses = [_address(context, builder, signature.args[0], array, place) for place in places]
        return _join(builder, [_splat(builder, builder.load(address), WIDTH) for address in addresses])

    return _rows(array, *[types.intp] * STATES), generate


@intrinsic
def store_rows(typing_context, array, first, second, third, fourth, rows):  # type: ignore
    """The opposite of `load_rows`."""

    def generate(context, builder, signature, arguments):
        array, *places, rows = arguments
        for place, row in zip(places, _split(builder, rows), strict=True):
            _store(builder, row, _address(context, builder, signature.args[0], array, place))
        return context.get_dummy_value()

    return types.void(array, *[types.intp] * STATES, _rows), generate


@intrinsic
def splat_row(typing_context, value):  # type: ignore
    """One float32 in every lane of a row."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0], WIDTH)

    return _row(types.float32), generate


@intrinsic
def store_quarter(typing_context, array, index, row):  # type: ignore
    """array[index : index + 4] = the first quarter."""

    def generate(context, builder, signature, arguments):
        array, index, row = arguments
        quarter = builder.shuffle_vector(row, _undefined(WIDTH), _lane_order(list(range(QUARTER))))
        _store(builder, quarter, _address(context, builder, signature.args[0], array, index))
        return context.get_dummy_value()

    return types.void(array, types.intp, _row), generate


@intrinsic
def largest(typing_context, rows, start):  # type: ignore
    """The largest of each lane of the rows and of `start`; NaN in the rows counts for nothing."""

    def generate(context, builder, signature, arguments):
        rows, largest = arguments
        for row in _split(builder, rows):
            largest = builder.select(builder.fcmp_ordered(">", row, largest), row, largest)
        return largest

    return _row(_rows, _row), generate


@intrinsic
def transpose_quarters(typing_context, rows):  # type: ignore
    """Lane 4 j + c of row k becomes lane 4 j + k of row c: a transpose of four by four for each quarter j."""

    def generate(context, builder, signature, arguments):
        def merge(x, y, order):
            # Of quarter j of x the lanes 0 to 3, of y 4 to 7.
            lanes = [
                j + (lane if lane < QUARTER else lane - QUARTER + WIDTH) for j in _QUARTERS for lane in order
            ]
            return builder.shuffle_vector(x, y, _lane_order(lanes))

        first, second, third, fourth = _split(builder, arguments[0])
        low, high, front, back = (0, 4, 1, 5), (2, 6, 3, 7), (0, 1, 4, 5), (2, 3, 6, 7)
        pairs = [(merge(first, second, order), merge(third, fourth, order)) for order in (low, high)]
        return _join(builder, [merge(*pair, order) for pair in pairs for order in (front, back)])

    return _rows(_rows), generate


_QUARTERS = range(0, WIDTH, QUARTER)


@intrinsic
def scan_quarters(typing_context, decay, drive, carry):  # type: ignore
    """h_t = decay_t h_{t-1} + drive_t for WIDTH steps of four rows, from the states `carry` on.

    As `transpose_quarters` leaves rows: lane 4 j + c of row k is step 4 j + k of row c; `carry` has row c in
    lane c of every quarter. Each quarter runs its four steps from zero, with the product of its decays; then
    the quarters' ends are scanned, and each quarter gets what came before it.
    """

    def generate(context, builder, signature, arguments):
        decay, drive, carry = arguments
        decays, drives = _split(builder, decay), _split(builder, drive)
        products, states = decays[:1], drives[:1]
        for a, b in zip(decays[1:], drives[1:], strict=True):
            states.append(_fma(builder, a, states[-1], b))
            products.append(builder.fmul(a, products[-1]))

        def moved(row, quarters, filling):
            lanes = [max(lane - QUARTER * quarters, -1) % (WIDTH + 1) for lane in range(WIDTH)]
            return builder.shuffle_vector(row, _floats(row, filling), _lane_order(lanes))

        product, state = moved(products[-1], 1, 1.0), moved(states[-1], 1, 0.0)
        quarters = 1
        while quarters < len(_QUARTERS) - 1:
            state = _fma(builder, product, moved(state, quarters, 0.0), state)
            product = builder.fmul(product, moved(product, quarters, 1.0))
            quarters *= 2
        before = _fma(builder, product, carry, state)
        pairs = zip(products, states, strict=True)
        return _join(builder, [_fma(builder, product, before, state) for product, state in pairs])

    return _rows(_rows, _rows, _row), generate


@intrinsic
def last_states(typing_context, states):  # type: ignore
    """The states behind what `scan_quarters` gave, as it takes them for the steps after."""

    def generate(context, builder, signature, arguments):
        lanes = [WIDTH - QUARTER + lane % QUARTER for lane in range(WIDTH)]
        last = builder.extract_value(arguments[0], STATES - 1)
        return builder.shuffle_vector(last, _undefined(WIDTH), _lane_order(lanes))

    return _row(_rows), generate


# ------------------------------------------------------------------------------------------------------------
# Compilation, cached between processes.


_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def _cache_root() -> Path | None:
    """The user's folder for caches (NUMBA_CACHE_DIR if set), or None if there is no home."""
    if numba.config.CACHE_DIR:  # type: ignore
        return Path(numba.config.CACHE_DIR)  # type: ignore
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "mambastyle"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mambastyle"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "mambastyle"


def inlined(function: Callable[..., Any]) -> Any:
    """Makes a function part of every kernel that calls it: a call passes some hundred words, which shows in a
    tile of 32 steps.
    """
    return numba.njit(inspect.unwrap(function), forceinline=True, **_OPTIONS)


# A length that no slice reaches.
_ENDLESS = np.iinfo(np.int64).max // 8


@inlined
def floats(address):  # type: ignore
    """The float32 array at an address, as long as it needs to be: the opposite of `address`.

    A kernel that takes addresses spares its caller the conversion of tensors to arrays.
    """
    return numba.carray(_pointer(address), _ENDLESS)  # type: ignore


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function at its first call, without the GIL, and keeps the machine code for later processes.

    Numba would look at the time stamp and size of the kernel's file alone, and put its files beside it.
    Installations may be read-only, and two of them may share stamps, so the folder is in the user's cache and
    named after a hash of that file and of those that kernels share; Numba itself tells processors apart.
    Where nothing can be written, every process compiles.
    """
    # Shape checkers that are switched on by an import hook wrap every function; Numba needs the bare one.
    function = inspect.unwrap(function)
    root = _cache_root()
    if root is None:
        _log.info("no folder for compiled kernels: they are compiled in every process")
        return numba.njit(function, **_OPTIONS)
    previous = numba.config.CACHE_DIR  # type: ignore
    shared = sorted(Path(__file__).parent.glob("cpu_*.py"))
    sources = [path.read_bytes() for path in (*shared, Path(inspect.getfile(function)))]
    source = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    numba.config.CACHE_DIR = str(root / f"kernels-{source}")  # type: ignore
    try:
        return numba.njit(function, cache=True, **_OPTIONS)
    # Numba raises RuntimeError when it finds no folder that it can write to.
    except (RuntimeError, OSError) as error:
        _log.info("no folder for compiled kernels (%s): they are compiled in every process", error)
        return numba.njit(function, **_OPTIONS)
    finally:
        numba.config.CACHE_DIR = previous  # type: ignore
