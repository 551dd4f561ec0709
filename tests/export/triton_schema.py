"""The parts of Triton Inference Server's model_config.proto that a configuration may use, as a protobuf message to parse with.

Field names, numbers and types are those of protobuf/model_config.proto in triton-inference-server/common, commit 08365eae35e2.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

F = descriptor_pb2.FieldDescriptorProto
SCALARS = {name: getattr(F, f"TYPE_{name.upper()}") for name in ("string", "int32", "int64", "uint32", "uint64", "bool")}
ENUMS = {
    "DataType": (
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 TYPE_INT64 TYPE_FP16 "
        "TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"
    ),
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
    "Format": "FORMAT_NONE FORMAT_NHWC FORMAT_NCHW",
}
# message -> "type name number", * for repeated, ? for a member of its oneof.
MESSAGES = {
    "ModelTensorReshape": ["int64* shape 1"],
    "ModelInput": [
        "string name 1",
        "DataType data_type 2",
        "Format format 3",
        "int64* dims 4",
        "ModelTensorReshape reshape 5",
        "bool is_shape_tensor 6",
        "bool allow_ragged_batch 7",
        "bool optional 8",
        "bool is_non_linear_format_io 9",
    ],
    "ModelOutput": [
        "string name 1",
        "DataType data_type 2",
        "int64* dims 3",
        "string label_filename 4",
        "ModelTensorReshape reshape 5",
        "bool is_shape_tensor 6",
        "bool is_non_linear_format_io 7",
    ],
    "ModelInstanceGroup": ["string name 1", "int32 count 2", "int32* gpus 3", "Kind kind 4", "string* profile 5", "bool passive 7"],
    "Latest": ["uint32 num_versions 1"],
    "Specific": ["int64* versions 1"],
    "ModelVersionPolicy": ["Latest? latest 1", "Specific? specific 3"],
    "ModelDynamicBatching": [
        "int32* preferred_batch_size 1",
        "uint64 max_queue_delay_microseconds 2",
        "bool preserve_ordering 3",
        "uint64 priority_levels 4",
    ],
    "WarmupInput": ["DataType data_type 1", "int64* dims 2", "bool? zero_data 3", "bool? random_data 4", "string? input_data_file 5"],
    "InputsEntry": ["string key 1", "WarmupInput value 2"],
    "ModelWarmup": ["string name 1", "uint32 batch_size 2", "InputsEntry* inputs 3", "uint32 count 4"],
    "ModelConfig": [
        "string name 1",
        "string platform 2",
        "ModelVersionPolicy version_policy 3",
        "int32 max_batch_size 4",
        "ModelInput* input 5",
        "ModelOutput* output 6",
        "ModelInstanceGroup* instance_group 7",
        "string default_model_filename 8",
        "ModelDynamicBatching? dynamic_batching 11",
        "ModelWarmup* model_warmup 16",
        "string backend 17",
        "string runtime 25",
    ],
}


def model_config():
    """An empty ModelConfig."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        if any("?" in field for field in fields):
            message.oneof_decl.add(name="choice")
        for field in fields:
            kind, key, number = field.split()
            label = F.LABEL_REPEATED if "*" in kind else F.LABEL_OPTIONAL
            added = message.field.add(name=key, number=int(number), label=label)
            if "?" in kind:
                added.oneof_index = 0
            kind = kind.rstrip("*?")
            if kind in SCALARS:
                added.type = SCALARS[kind]
            else:
                added.type = F.TYPE_ENUM if kind in ENUMS else F.TYPE_MESSAGE
                added.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
