"""The form of exported files: contract, domains, and what each runtime's published table lists."""

import onnx
import pytest
from exported_models import exported
from onnx import TensorProto, helper

from fastcm.errors import RunError
from fastcm.export import operators
from fastcm.export.structure import check_structure, unsupported
from fastcm.export.targets import TARGETS, chosen_target
from fastcm.generation.onnx_contract import Contract

ORT = TARGETS["ort"]


@pytest.mark.slow
def test_structure_is_checked(tmp_path):
    done = exported("plain")
    contract = done.contract
    check_structure(done.path, contract, ORT)
    model = onnx.load(done.path)

    def refused(change, words):
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        change(broken)
        path = tmp_path / "broken.onnx"
        path.write_bytes(broken.SerializeToString())
        with pytest.raises(RunError, match=words):
            check_structure(path, contract, ORT)
        assert [file.name for file in tmp_path.iterdir()] == ["broken.onnx"]

    def fix_batch(m):
        m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    def private_domain(m):
        m.opset_import.add(domain="com.example", version=1)
        m.graph.node.add(op_type="Foo", domain="com.example", name="foo", input=["images"], output=["foo_out"])

    def unknown_operator(m):
        m.graph.node[0].op_type = "Foo"

    def unlisted_operator(m):
        m.graph.node.add(op_type="Det", name="the_det", input=["images"], output=["det_out"])

    refused(fix_batch, "fixed batch|malformed graph")
    refused(private_domain, "operator of a domain that ort lacks in broken.onnx: com.example::Foo|malformed graph")
    refused(unknown_operator, "malformed graph in broken.onnx: .*Foo")
    refused(unlisted_operator, r"that ONNX Runtime, docs/OperatorKernels.md, .* does not list in broken.onnx: Det \(the_det\)")
    with pytest.raises(RunError, match="unexpected shape or type in plain.onnx: images is FLOAT"):
        check_structure(done.path, contract._replace(uint8=True), ORT)
    with pytest.raises(RunError, match="unexpected inputs and outputs"):
        check_structure(done.path, contract._replace(classes=None), ORT)
    with pytest.raises(RunError, match="another batch than 4 in plain.onnx"):
        check_structure(done.path, contract._replace(batch=4), ORT)
    with pytest.raises(RunError, match="fixed batch in batch.onnx: noise is FLOAT"):
        check_structure(exported("batch").path, contract, ORT)


@pytest.mark.slow
def test_targets_refuse_each_others_graphs():
    """GroupNormalization is TensorRT's alone, the noise stream's shifts the CPU's; a shader of WebGPU has no room for a class row."""
    tensorrt, seeded = (exported(name) for name in ("tensorrt", "seeded"))
    for name, fault in (("ort", "GroupNormalization"), ("web", "Split .* with 12 inputs and outputs of 8")):
        with pytest.raises(RunError, match=f"does not list in tensorrt.onnx: {fault}"):
            check_structure(tensorrt.path, tensorrt.contract, TARGETS[name])
    for name in ("tensorrt", "ort", "web"):
        with pytest.raises(RunError, match="does not list in seeded.onnx: Bit"):
            check_structure(seeded.path, seeded.contract, TARGETS[name])
    check_structure(seeded.path, seeded.contract, chosen_target("ort", seeded=True))


def graph_of(op, kind):
    x, y = (helper.make_tensor_value_info(name, kind, ["batch", 3]) for name in ("x", "y"))
    return helper.make_model(helper.make_graph([helper.make_node(op, ["x"], ["y"], name="node")], "g", [x], [y]))


def test_types_count_as_operators_do():
    assert list(unsupported(graph_of("Sigmoid", TensorProto.FLOAT16), TARGETS["tensorrt"])) == []
    assert list(unsupported(graph_of("Sigmoid", TensorProto.DOUBLE), TARGETS["tensorrt"])) == ["Sigmoid (node) of float64"]
    assert list(unsupported(graph_of("Round", TensorProto.FLOAT), TARGETS["web"])) == ["Round (node)"]
    assert list(unsupported(graph_of("Neg", TensorProto.UINT8), ORT)) == ["Neg (node) of uint8"]


def test_a_shader_holds_few_values():
    """WebGPU guarantees eight storage buffers: a Split into more pieces than seven fails on a device that offers no more than that."""
    for pieces, faults in ((7, []), (8, ["Split (node) with 9 inputs and outputs of 8"])):
        names = [f"y{place}" for place in range(pieces)]
        x, *parts = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", *names))
        graph = helper.make_graph([helper.make_node("Split", ["x"], names, name="node", num_outputs=pieces)], "g", [x], parts)
        assert list(unsupported(helper.make_model(graph), TARGETS["web"])) == faults
        assert list(unsupported(helper.make_model(graph), ORT)) == []


@pytest.mark.parametrize("table", [operators.ORT, operators.ORT_CPU, operators.TENSORRT, operators.WEB])
def test_tables_name_their_source_and_real_operators(table):
    assert table.source and table.version and table.opsets[0] < table.opsets[1]
    kinds = {"float32", "float16", "int32", "int64", "uint8", "uint32", "uint64", "bool"}
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert len(table.operators) > 40 and {name for name in table.operators if "/" not in name} <= known
    assert all(types and types <= kinds for types in table.operators.values())


def test_what_tensorrt_lacks_has_no_row():
    assert not {"BitShift", "BitwiseAnd", "BitwiseXor", "RandomNormal"} & set(operators.TENSORRT.operators)
    assert "uint8" not in operators.TENSORRT.operators["Clip"] and "uint8" in operators.TENSORRT.operators["Cast"]
    assert Contract(1, 1, 8, uint8=True).output[0] == (8, 8, 1)
