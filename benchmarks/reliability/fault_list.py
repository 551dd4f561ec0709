"""The 25 faults, what is expected of each, and the tests that inject it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """tests: node ids below tests/; a file's name alone stands for all of its tests."""

    number: int
    what: str
    expected: str
    tests: tuple[str, ...]


KILLED, CHECKPOINT, BAD_STEP = "faults/test_faults_kill.py", "faults/test_faults_checkpoint.py", "faults/test_faults_nonfinite.py"
FUZZ, HOSTILE, SETTINGS = (
    "faults/test_faults_fuzz.py::test_mutants_are_read_or_refused",
    "faults/test_faults_hostile.py",
    "faults/test_faults_settings.py",
)
TRAINING, ONNX = "training/test_training.py", "generation/test_onnx_generator.py"

FAULTS = (
    Fault(
        1,
        "unknown option or misspelt setting",
        "exit 2, the key and the nearest one named, nothing created",
        (
            "cli/test_cli_errors.py::test_usage_errors",
            "training/test_config_file.py::test_mistakes_are_named",
            f"{TRAINING}::test_bad_settings_name_themselves_and_create_nothing",
        ),
    ),
    Fault(
        2,
        "value out of range; any setting, any value",
        "exit 2, field, value and range named, before data is touched",
        (
            f"{SETTINGS}::test_values_out_of_range_name_themselves",
            f"{SETTINGS}::test_any_setting_is_taken_or_refused",
            f"{SETTINGS}::test_any_settings_file_is_read_or_refused",
        ),
    ),
    Fault(
        3,
        "data missing, empty or without a picture",
        "exit 2, path and accepted kinds named",
        ("data/test_data.py::test_sources_that_are_none",),
    ),
    Fault(
        4,
        "corrupt pictures, also mutated ones",
        "named, or skipped, counted and listed on request; no crash",
        (
            "data/test_image_decoding.py::test_bad_picture_is_named",
            "data/test_data.py::test_skipping_bad_pictures",
            "training/test_train_sources.py::test_bad_pictures_by_option",
            f"{FUZZ}[png]",
            f"{FUZZ}[jpg]",
        ),
    ),
    Fault(
        5,
        "odd pictures: grey, palette, alpha, CMYK, 1 bit, 16 bits, rotated, animated",
        "converted by the stated rule; golden pixels",
        ("data/test_image_decoding.py",),
    ),
    Fault(
        6,
        "decompression bombs",
        "refused by name, little memory",
        (
            "data/test_image_decoding.py::test_bomb_is_refused_by_its_header",
            "data/test_sources.py::test_zip_bomb_is_not_inflated",
            f"{HOSTILE}::test_refused_in_a_line_and_in_time[picture bomb]",
        ),
    ),
    Fault(7, "label errors", "exit 2 with the row's number", ("data/test_labels.py::test_faults_by_row",)),
    Fault(
        8,
        "NaN or infinity in loss, gradient or batch",
        "step skipped and counted, all buffers bit-equal; ten in a row end the run",
        (
            f"{BAD_STEP}::test_a_step_that_is_not_finite_leaves_no_trace",
            f"{BAD_STEP}::test_ten_in_a_row_end_the_run_and_the_checkpoint_stays",
            f"{BAD_STEP}::test_nine_in_a_row_do_not",
            "kernels/test_optimizer_step.py::test_a_gradient_that_is_not_finite_leaves_every_buffer_bit_equal",
        ),
    ),
    Fault(
        9,
        "fp16 that fits at no loss scale",
        "exit 1, --precision bf16 named",
        (f"{BAD_STEP}::test_fp16_that_fits_at_no_scale_ends_the_run",),
    ),
    Fault(
        10,
        "out of memory",
        "microbatch halved, weights those of a run that was told so; exit 1 at one image",
        (
            f"{BAD_STEP}::test_memory_that_runs_out_halves_the_microbatch_alone",
            f"{BAD_STEP}::test_no_memory_for_one_image_ends_the_run_and_the_checkpoint_stays",
        ),
    ),
    Fault(
        11,
        "no space left, before or while saving",
        "exit 1, needed and free bytes named, old checkpoints intact, no half file",
        (
            f"{CHECKPOINT}::test_a_file_system_that_fills_up",
            f"{CHECKPOINT}::test_a_write_that_the_kernel_refuses",
            f"{CHECKPOINT}::test_a_disk_without_room_for_a_checkpoint_is_noticed_before_the_first_step",
            "data/test_image_cache.py::test_full_disk_names_the_cache",
        ),
    ),
    Fault(
        12,
        "run folder read-only, not a folder, or gone",
        "refused before the first step, an error in the middle, never silence",
        (
            f"{CHECKPOINT}::test_a_file_system_that_becomes_read_only",
            f"{CHECKPOINT}::test_a_run_folder_that_vanishes",
            f"{CHECKPOINT}::test_out_that_cannot_be_a_run_folder",
            f"{TRAINING}::test_a_folder_of_something_else_is_left_alone",
        ),
    ),
    Fault(
        13,
        "kill -9 at random points of training and saving",
        "a complete checkpoint always, nothing stale, final weights bit-equal",
        (f"{KILLED}::test_killed_again_and_again", "data/test_image_cache.py::test_killed_while_decoding_goes_on"),
    ),
    Fault(
        14,
        "SIGTERM and SIGINT, once and twice",
        "checkpoint of the finished step, exit 143 or 130; the second ends at once",
        (f"{KILLED}::test_a_signal_saves_the_finished_step_and_a_second_ends_at_once",),
    ),
    Fault(
        15,
        "newest checkpoint truncated, flipped, empty or without manifest",
        "warning with its name, the one before is taken; asked for by path: error",
        (f"{CHECKPOINT}::test_the_newest_checkpoint_is_damaged", f"{SETTINGS}::test_any_manifest_is_refused_or_true", f"{FUZZ}[manifest]"),
    ),
    Fault(
        16,
        "nothing good to resume from",
        "exit 1 or 2, never a silent restart",
        (
            f"{CHECKPOINT}::test_a_run_goes_on_from_the_last_good_checkpoint_or_not_at_all",
            f"{CHECKPOINT}::test_a_run_without_its_checkpoints_says_that_it_begins_again",
        ),
    ),
    Fault(
        17,
        "resumed with other settings or data",
        "exit 2 with the fields, old -> new; --duration may grow",
        (
            f"{TRAINING}::test_training_may_be_extended_and_nothing_else_may_change",
            "training/test_train_sources.py::test_changed_data_is_noticed_on_resume",
        ),
    ),
    Fault(
        18,
        "stopped and resumed, every method",
        "weights, averages, moments, target bit-equal to the unbroken run",
        (
            f"{TRAINING}::test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit",
            "training/test_methods.py::test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit",
        ),
    ),
    Fault(
        19,
        "models of another kind, damaged or hostile",
        "exit 2 with keys or kind; no code run (canary)",
        (
            "weights/test_weights_openai.py",
            "weights/test_weights_edm.py",
            f"{TRAINING}::test_a_teacher_must_fit",
            HOSTILE,
            f"{FUZZ}[safetensors]",
            f"{FUZZ}[config]",
            f"{FUZZ}[pt]",
            f"{FUZZ}[pkl]",
        ),
    ),
    Fault(
        20,
        "LPIPS weights missing, no network",
        "exit 2 at once with path, hash and option; the network is not tried",
        ("consistency/test_lpips.py::test_absent_weights_are_named_at_once", "test_house.py::test_no_test_reaches_the_network"),
    ),
    Fault(
        21,
        "export that would lie: fixed batch, teacher, bad options",
        "exit 1 or 2, no file under the final name",
        (
            "export/test_export.py::test_a_network_that_fixes_the_batch_is_refused_in_one_line",
            "export/test_export.py::test_bad_options_create_nothing",
            "export/test_export.py::test_a_teacher_is_not_exported_as_a_one_step_generator",
        ),
    ),
    Fault(
        22,
        "export whose numbers are wrong",
        "exit 1 with error, batch, seed and pixel; nothing published",
        (
            "export/test_export.py::test_a_wrong_constant_is_caught_and_nothing_is_left",
            "export/test_export.py::test_a_wrong_class_is_caught",
            "export/test_export.py::test_nan_fails_the_check",
        ),
    ),
    Fault(
        23,
        "ONNX and data files that are damaged, hostile or mutated",
        "one line each; no crash, no code, no file outside, bounded memory",
        (
            f"{ONNX}::test_files_that_cannot_be_used_are_one_line",
            f"{ONNX}::test_inputs_are_checked",
            f"{ONNX}::test_nan_weights_give_an_error_not_a_picture",
            HOSTILE,
            f"{FUZZ}[onnx]",
            f"{FUZZ}[npz]",
            f"{FUZZ}[tar]",
            f"{FUZZ}[zip]",
            "data/test_tar_shards.py::test_shards_that_are_refused",
        ),
    ),
    Fault(
        24,
        "provider asked for but not active; two wheels",
        "exit 1 with the missing library; auto warns once and runs",
        ("generation/test_onnx_session.py",),
    ),
    Fault(
        25,
        "two trainers on one folder; one process of several dies",
        "exit 2 with pid and host; the others stop within seconds",
        (
            f"{CHECKPOINT}::test_two_trainers_on_one_folder",
            f"{TRAINING}::test_one_trainer_per_folder",
            "training/test_parallel.py::test_a_killed_process_ends_the_others_within_seconds",
            "training/test_parallel.py::test_the_first_error_is_shown_once_and_ends_all",
        ),
    ),
)
