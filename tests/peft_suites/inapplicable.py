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
        "*::test_loading_model_with_trainble_tokens_requires_grad_set_correctly[*",
    ),
    **{
        f"suite_{suite}": ("*::test_training*_layer_indexing[*", "*::test_training*_gradient_checkpointing[*")
        for suite in ("decoder_models", "encoder_decoder_models", "feature_extraction_models")
    },
    "suite_tuners_utils": ("TestModelAndLayerStatus::test_*requires_grad_*small[*",),
}

# PEFT runs these for LoRA only, by a look at the class of the config. They run for the spectral methods too.
_BIAS, _MIXED_BATCHES = "*::test_adding_multiple_adapters_with_bias_raises[*", "*::test_*mixed_adapter_batches[*"
GUARDED_FOR_LORA: dict[str, tuple[str, ...]] = {
    "suite_custom_models": (_BIAS,),
    "suite_decoder_models": (_BIAS, _MIXED_BATCHES),
    "suite_encoder_decoder_models": (_BIAS, _MIXED_BATCHES),
}

LORA_TENSORS = "asserts on LoRA's matrices A and B by name, their ranks as attributes, their scaling or their classes"
MIXED = "PeftMixedModel takes a closed list of PEFT's types, without OSF and PSOFT"
HOTSWAP = "PEFT swaps adapters of LoRA alone"
OWN_MESSAGES = "a `rank_pattern` that matches no module is an error here, not a warning"
DIFFUSERS = "needs a pipeline of diffusers, which is not installed"
NETWORK = "downloads a model, of which there is no small one to build"

# Tests written for LoRA that are about what LoRA alone has; they do not run. Beside them, those are skipped that ask
# for a field of LoRA's that OSF and PSOFT lack too, or for a layer that neither OSF nor PSOFT adapts.
ABOUT_LORA: dict[str, dict[str, str]] = {
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

ONE_REPLACES = (
    "two adapters that each take the place of the weight have no sum; activating both raises ValueError. "
    "OSF computes with the first one alone, and PEFT skips its merges here; PSOFT passes"
)
ONE_ROW = (
    "the Conv1D has one output: the unit vector on that side has one entry, 1 or -1, and no step turns it. "
    "OSF leaves a Conv1D out and has nothing to train; PSOFT raises ValueError for it"
)
DISPATCH = "registers layers of LoRA's by a private method of LoraConfig, which OSFConfig and PsoftConfig lack as well"
REPR = "the class and the matrices of LoRA's layers by name; OSF and PSOFT print their own"
SUMS = "neither OSF nor PSOFT adds adapters up; "

CUSTOM_MODELS = {
    "TestDynamicDispatch::*": DISPATCH,
    **{f"TestLayerRepr::test_repr_lora_{layer}[*": REPR for layer in ("linear", "conv1d")},
    **{f"TestLayerRepr::test_repr_lora_embedding[{method}]": REPR for method in ("SVFit", "PiSSA", "SCT")},
    "TestMultiRankAdapter::test_multirank[SST on a pool]": "asks for 4 of the 2 triplets in the table's pool, by "
    "the name of LoRA's matrix",
    "TestMultiRankAdapter::test_multirank_2[*": "ranks up to 64 of weights with 10 rows: clamped, by OSF as well, or "
    "an error. PSOFT has no `rank_pattern`, and OSF no `lora_A`",
    "*::test_add_weighted_adapter_cat_with_rank_pattern[SST*": SUMS + "SST clamps no rank, and a weight with 10 rows "
    "has none of 16",
    "*::test_add_weighted_adapter_cat_with_rank_pattern[SCT-*": SUMS + "updates that replace the weight have no sum",
    **{
        f"*::test_add_weighted_adapter_{test}[{method}]": SUMS + "'linear' is exact here, so it is for SVFit alone"
        for test in ("negative_weight_negates_adapter", "subtraction_with_negative_weights")
        for method in ("PiSSA", "SST", "SST on a pool", "SCT")
    },
    "*::test_add_weighted_adapter_with_different_scaling[*": SUMS
    + "approximations by a `density`, which sums here, all "
    "of them exact, do not have",
    "*_modules_to_save_merging_adapters*": SUMS + "LoRA's sum takes over what one adapter trains beside its updates, "
    "whatever the weight is; here that is an error with a message of its own",
    "*::test_add_adapter_rejects_duplicate_name_without_mutation[*-True]": MIXED,
    **{
        f"*::test_load_resized_embedding_ignore_mismatched_sizes[{method}]": "a start of other sizes is refused: the "
        "tensors of an update are one another's factors. OSF and PSOFT adapt no embedding"
        for method in ("SVFit", "PiSSA", "SCT")
    },
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
}

INAPPLICABLE: dict[str, dict[str, str]] = {
    "suite_low_level_api": {
        "*::test_inject_from_state_dict_low_cpu_mem_usage[*": "the fingerprint, a buffer, is not on the meta device",
    },
    "suite_custom_models": CUSTOM_MODELS,
    "suite_decoder_models": {
        **{
            f"*::test_merge_layers_multi[{kwargs}-*": ONE_REPLACES
            for kwargs in ("SSTConfig-config_kwargs2", "KeptSCTConfig")
        },
    },
}
