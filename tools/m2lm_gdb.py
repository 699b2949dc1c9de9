"""What gdb prints of m2lm's types: shape, dtype and the first values.

(gdb) source PREFIX/share/m2lm/m2lm_gdb.py         # or add-auto-load-safe-path, or a line in ~/.gdbinit
(gdb) print weights
m2lm::Tensor [2, 3] f32 {0, 0.5, 1, 1.5, 2, 2.5}
"""

import re
import struct

import gdb
import gdb.printing

SHOWN = 8  # values

# dtype -> struct format; bf16 has none
FORMATS = {"f64": "d", "f32": "f", "f16": "e", "i64": "q", "i32": "i", "i16": "h", "i8": "b", "u8": "B", "bool": "?"}
SIZES = {**{dtype: struct.calcsize("<" + code) for dtype, code in FORMATS.items()}, "bf16": 2}
DTYPE_OF_TYPE = {"double": "f64", "float": "f32", "m2lm::Half": "f16", "m2lm::Bf16": "bf16", "long": "i64", "long long": "i64", "int": "i32",
                 "short": "i16", "signed char": "i8", "unsigned char": "u8", "bool": "bool"}
DTYPE_OF_ENUMERATOR = {"boolean": "bool"}


def name_of(element):
    """A type's name as programs write it: without qualifiers, and without the inline namespace of the version, m2lm::v0_1."""
    return re.sub(r"\bm2lm::v\d+_\d+::", "m2lm::", str(element.unqualified().strip_typedefs()))


def dtype_of(element):
    name = name_of(element)
    return DTYPE_OF_TYPE.get(name, name)


def number(dtype, raw):
    if dtype == "bf16":
        return struct.unpack("<f", b"\0\0" + raw)[0]
    return struct.unpack("<" + FORMATS[dtype], raw)[0]


def text(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def row_major(extents):
    strides, step = [], 1
    for extent in reversed(extents):
        strides.insert(0, step)
        step *= extent
    return strides


def values(dtype, extents, strides, address):
    """The first values in row-major order, as C++ would write them."""
    if address == 0 or 0 in extents:
        return "{}"
    if dtype not in SIZES:
        return "{…}"
    inferior, shown, index = gdb.selected_inferior(), [], [0] * len(extents)
    count = 1
    for extent in extents:
        count *= extent
    for _ in range(min(count, SHOWN)):
        offset = sum(i * stride for i, stride in zip(index, strides)) * SIZES[dtype]
        try:
            shown.append(text(number(dtype, bytes(inferior.read_memory(address + offset, SIZES[dtype])))))
        except gdb.MemoryError:
            return "{unreadable}"
        for axis in reversed(range(len(extents))):
            index[axis] += 1
            if index[axis] < extents[axis]:
                break
            index[axis] = 0
    return "{" + ", ".join(shown) + (", …}" if count > SHOWN else "}")


def elements_of_array(array):
    """The elements of a std::array; one of no elements has none that can be read."""
    field = array["_M_elems"]
    first, last = field.type.strip_typedefs().range()
    return [int(field[i]) for i in range(first, last + 1)]


def pointer_to_bytes(value):
    """The pointer inside a std::unique_ptr<std::byte[], …>, whatever the library calls its members."""
    kind = value.type.strip_typedefs()
    if kind.code == gdb.TYPE_CODE_PTR:
        return value if str(kind.target()) == "std::byte" else None
    found = (pointer_to_bytes(value[field]) for field in kind.fields()) if kind.code == gdb.TYPE_CODE_STRUCT else ()
    return next((pointer for pointer in found if pointer is not None), None)


class ShapePrinter:
    def __init__(self, value):
        self.value = value

    def extents(self):
        return elements_of_array(self.value["extent_"])[: int(self.value["rank_"])]

    def to_string(self):
        return str(self.extents())


class TensorPrinter:
    def __init__(self, value):
        self.value = value

    def to_string(self):
        element = self.value.type.strip_typedefs().template_argument(0)
        extents = ShapePrinter(self.value["shape_"]).extents()
        if name_of(element).startswith("m2lm::OnDevice"):
            return f"m2lm::Tensor {extents} {dtype_of(element.template_argument(0))} in a device's memory"
        pointer = pointer_to_bytes(self.value["bytes_"])
        dtype = dtype_of(element)
        return f"m2lm::Tensor {extents} {dtype} {values(dtype, extents, row_major(extents), int(pointer))}"


class ViewPrinter:
    def __init__(self, value):
        self.value = value

    def to_string(self):
        element = self.value.type.strip_typedefs().template_argument(0)
        extents, strides = elements_of_array(self.value["extent_"]), elements_of_array(self.value["stride_"])
        strided = "" if strides == row_major(extents) else f" strides {strides}"
        if name_of(element).startswith("m2lm::OnDevice"):
            return f"m2lm::View {extents}{strided} {dtype_of(element.unqualified().template_argument(0))} in a device's memory"
        dtype = dtype_of(element)
        return f"m2lm::View {extents}{strided} {dtype} {values(dtype, extents, strides, int(self.value['data_']))}"


class AnyTensorPrinter:
    def __init__(self, value):
        self.value = value

    def to_string(self):
        enumerator = str(self.value["dtype_"]).rpartition("::")[2]
        dtype = DTYPE_OF_ENUMERATOR.get(enumerator, enumerator)
        extents = ShapePrinter(self.value["shape_"]).extents()
        return f"m2lm::AnyTensor {extents} {dtype} {values(dtype, extents, row_major(extents), int(self.value['data_']))}"


class ScalarPrinter:
    def __init__(self, value):
        self.value = value

    def to_string(self):
        dtype = dtype_of(self.value.type)
        return text(number(dtype, struct.pack("<H", int(self.value["bits"]))))


NAMESPACE = r"^m2lm::(?:v\d+_\d+::)?"  # objects of any version
printers = gdb.printing.RegexpCollectionPrettyPrinter("m2lm")
printers.add_printer("Shape", NAMESPACE + r"Shape$", ShapePrinter)
printers.add_printer("Tensor", NAMESPACE + r"Tensor<.*>$", TensorPrinter)
printers.add_printer("View", NAMESPACE + r"View<.*>$", ViewPrinter)
printers.add_printer("AnyTensor", NAMESPACE + r"AnyTensor$", AnyTensorPrinter)
printers.add_printer("Scalar", NAMESPACE + r"(Bf16|Half)$", ScalarPrinter)
gdb.printing.register_pretty_printer(gdb.current_objfile(), printers, replace=True)
