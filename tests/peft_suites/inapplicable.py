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
    "suite_tuners_utils": ("TestModelAndLayerStatus::test_*requires_grad_*small[*",),
}

LORA_TENSORS = "asserts on LoRA's matrices A and B by name, their ranks as attributes, their scaling or their classes"
MIXED = "PeftMixedModel takes a closed list of PEFT's types, without OSF and PSOFT"
HOTSWAP = "PEFT swaps adapters of LoRA alone"
OWN_MESSAGES = "a `rank_pattern` that matches no module is an error here, not a warning"
DIFFUSERS = "needs a pipeline of diffusers, which is not installed"
WEIGHTED = "a weighted sum by LoRA's options; neither OSF nor PSOFT has weighted sums"
NETWORK = "downloads a model, of which there is no small one to build"

# Tests written for LoRA that are about what LoRA alone has; they do not run. Beside them, those are skipped that ask
# for a field of LoRA's that OSF and PSOFT lack too, or for a layer that neither OSF nor PSOFT adapts.
ABOUT_LORA: dict[str, dict[str, str]] = {
    "suite_custom_models": {
        "TestDynamicDispatch::*": LORA_TENSORS,
        "TestLayerRepr::test_repr_lora_*": LORA_TENSORS,
        "TestMultiRankAdapter::*": LORA_TENSORS,
        "TestRequiresGrad::test_requires_grad_*": LORA_TENSORS,
        "*::test_loading_adapter_preserves_custom_requires_grad[*": LORA_TENSORS,
        "*::test_loading_model_with_trainble_tokens_requires_grad_set_correctly[*": LORA_TENSORS,
        "*::test_add_weighted_adapter_with_different_scaling[*": WEIGHTED,
        "*_modules_to_save_merging_adapters*": WEIGHTED,
        "*::test_add_adapter_rejects_duplicate_name_without_mutation[*-True]": MIXED,
        "*::test_gpt2_dora_*": NETWORK,
        "*::test_load_resized_embedding_ignore_mismatched_sizes[*": NETWORK,
        "*::test_multiple_adapters_automatic_modules_to_save[*": NETWORK,
    },
    "suite_low_level_api": {
        "TestLowLevelFunctional::*": LORA_TENSORS,
        "*::test_inject_from_state_dict_stable_diffusion[*": DIFFUSERS,
        "*::test_inject_from_state_dict_missing_keys_warning[*": LORA_TENSORS,
        "*_with_weight_conversion[*": LORA_TENSORS,
        "*::test_prefix_removal_is_undone[*": LORA_TENSORS,
        "*::test_save_pretrained_warns_for_unsharded_state_dict[*": LORA_TENSORS,
    },
    "suite_tuners_utils": {
        "*::test_add_second_adapter_with_all_linear_works[*": LORA_TENSORS,
        "*::test_module_type_small[*": LORA_TENSORS,
        "*::test_*adapter_model_type_small[*": LORA_TENSORS,
        "*::test_peft_types_small[*": LORA_TENSORS,
        "*::test_nb_params_small[*": LORA_TENSORS,
        "*::test_base_model_type_transformers_automodel[*": NETWORK,
        "*::test_model_status_with_*": LORA_TENSORS,
        "*::test_mixed_model_raises[*": MIXED,
        "TestRankAndAlphaPattern::*": LORA_TENSORS,
        "TestTunerStateDictKeyPrefixes::*": LORA_TENSORS,
    },
    "suite_mixed": {"*": MIXED},
    "suite_other": {"*::test_targeting_trainable_tokens_raises[*": LORA_TENSORS},
    "suite_config": {
        "*::test_from_pretrained_cache_dir[*": "downloads into another cache",
        "TestLoraNestedConfigRoundTrip::*": "the configs of LoRA's own variants within LoRA's",
    },
    "suite_hub_features": {
        "*::test_custom_peft_type_does_not_raise[*": "sets the type of LoRA by its name",
    },
    "suite_initialization": {
        **{
            f"TestLoraInitialization::{test}": LORA_TENSORS
            for test in (
                "test_lora_*",
                "test_rank_alpha_pattern_override[*",
                "test_*_targets_lora_layer_raises[*",
                "test_mha_*",
                "test_error_raised_if_rank_not_divisible_by_groups[*",
            )
        },
        "TestLoraInitialization::test_nemotron_h_*": NETWORK,
        "TestLoraInitialization::test_*unmatched_*": OWN_MESSAGES,
        "TestLoraInitialization::test_partially_matched_*": OWN_MESSAGES,
        "TestLoraInitialization::test_misconfigured_second_adapter_*": OWN_MESSAGES,
        "*::test_no_infinite_recursion[*PeftMixedModel]": MIXED,
        "*::test_get_peft_model_*low_cpu_mem_usage_works[*": LORA_TENSORS,
        "*::test_mixed_model_*": MIXED,
        "test_from_pretrained_missing_keys_warning[*": LORA_TENSORS,
        "TestCordaInitialization::*": "an initialization of LoRA",
        "TestHotSwapping::*": HOTSWAP,
        "TestScaling::*": "updates have no scaling",
    },
}

ONE_REPLACES = "two adapters that each take the place of the weight have no sum; activating both raises ValueError"
ONE_ROW = "the Conv1D has one output: the unit vector on that side has one entry, and a step cannot turn it"

INAPPLICABLE: dict[str, dict[str, str]] = {
    "suite_hub_features": {
        "*::test_save_and_load_base_model_revision[*": "the BERT that is built has no head; each load draws one",
    },
    "suite_low_level_api": {
        "*::test_inject_from_state_dict_low_cpu_mem_usage[*": "the fingerprint, a buffer, is not on the meta device",
    },
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
