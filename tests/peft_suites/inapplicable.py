"""The tests of PEFT that do not apply to a spectral method, and why.

By suite: a pattern of test ids (as of a shell, but for brackets, which mean themselves) and the reason. A pattern that
matches nothing is an error, and so is a test that passes although it is listed.
"""

# These tests assert that every parameter of the active adapter trains. The frozen starts are parameters without
# gradient: as buffers, FSDP2 would replicate them, DDP would broadcast them in every forward pass, and TRL's copy of a
# reference adapter would miss them. They run without seeing the starts, as they except AdaLoRA's `ranknum` by class.
FROZEN_STARTS_EXEMPT: dict[str, tuple[str, ...]] = {
    "suite_custom_models": (
        "*::test_set_requires_grad[*",
        "*::test_loading_model_requires_grad_set_correctly[*",
        "*::test_loading_model_with_modules_to_save_requires_grad_set_correctly[*",
    ),
    "suite_decoder_models": (
        "*::test_training_decoders_layer_indexing[*",
        "*::test_training_decoders_gradient_checkpointing[*",
    ),
}

ONE_REPLACES = "two adapters that each take the place of the weight have no sum; activating both raises ValueError"
ONE_ROW = "the Conv1D has one output: the unit vector on that side has one entry, and a step cannot turn it"

INAPPLICABLE: dict[str, dict[str, str]] = {
    "suite_custom_models": {
        **{
            f"*::test_only_params_are_updated[Embedding + Conv1D {row}-*": ONE_ROW
            for row in (
                *(f"{case} {method}" for case in ("1", "2 trainable tokens") for method in ("SST*", "SCT")),
                "4 SCT",
                "5 SCT",
            )
        },
        **{
            f"TestMultipleActiveAdapters::{test}[{method} Same-*": ONE_REPLACES
            for method in ("SST", "SCT")
            for test in (
                "test_multiple_active_adapters_forward",
                "test_multiple_active_adapters_merge_and_unmerge",
                "test_merge_layers_multi",
                "test_sequential_merge_matches_batch_merge",
                "test_unmerge_after_sequential_merge_restores_base",
            )
        },
    },
    "suite_decoder_models": {
        **{
            f"*::test_merge_layers_multi[{kwargs}-*": ONE_REPLACES
            for kwargs in ("SSTConfig-config_kwargs2", "KeptSCTConfig")
        },
    },
}
