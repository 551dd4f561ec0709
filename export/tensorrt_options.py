"""Options of TensorRT's command-line tools as their published help lists them: what the commands that are written may use."""

TRTEXEC_SOURCE = "NVIDIA/TensorRT, trtexec --help of TensorRT 10"
TRTEXEC = frozenset(
    """
    --onnx --saveEngine --loadEngine --minShapes --optShapes --maxShapes --shapes --inputIOFormats --outputIOFormats --memPoolSize
    --profilingVerbosity --avgTiming --refit --stripWeights --versionCompatible --pluginInstanceNorm --useRuntime --excludeLeanRuntime
    --sparsity --noTF32 --fp16 --bf16 --int8 --fp8 --best --stronglyTyped --directIO --precisionConstraints --layerPrecisions
    --layerOutputTypes --safe --getPlanVersionOnly --tacticSources --noBuilderCache --timingCacheFile --errorOnTimingCacheMiss --preview
    --builderOptimizationLevel --maxTactics --hardwareCompatibilityLevel --runtimePlatform --tempdir --maxAuxStreams --profile
    --skipInference --loadInputs --exportTimes --useCudaGraph --noDataTransfers
    """.split()
)

POLYGRAPHY_SOURCE = "NVIDIA/TensorRT, tools/Polygraphy/polygraphy/tools/args"
POLYGRAPHY_RUN = frozenset(
    """
    --onnxrt --trt --trt-min-shapes --trt-opt-shapes --trt-max-shapes --strongly-typed --tf32 --fp16 --int8 --precision-constraints
    --sparse-weights --load-timing-cache --save-timing-cache --save-tactics --load-tactics --tactic-sources --refittable --pool-limit
    --preview-features --direct-io --input-shapes --val-range --atol --rtol --check-error-stat --save-engine --seed
    """.split()
)
