"""The tests of PEFT that do not apply to a spectral method, and why.

By suite: a pattern of test ids (as of a shell, but for brackets, which mean themselves) and the reason. A pattern that
matches nothing is an error, and so is a test that passes although it is among the expected failures.
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
    "suite_tuners_utils": (
        "TestModelAndLayerStatus::test_requires_grad_*[*",
        "TestModelAndLayerStatus::test_model_requires_*[*",
    ),
}

# PEFT runs these for LoRA only, by a look at the class of the config. They run for the spectral methods too.
_BIAS, _MIXED_BATCHES = "*::test_adding_multiple_adapters_with_bias_raises[*", "*::test_*mixed_adapter_batches[*"
GUARDED_FOR_LORA: dict[str, tuple[str, ...]] = {
    "suite_custom_models": (_BIAS,),
    "suite_decoder_models": (_BIAS, _MIXED_BATCHES),
    "suite_encoder_decoder_models": (_BIAS, _MIXED_BATCHES),
}

COUNTS = "counts the parameters of LoRA's two matrices, all of which train, in figures"
LORA_LAYERS = "expects LoRA's layers for convolutions and embeddings, and two nn.Linear in each"
LORA_KEYS = "takes a tensor by its name in LoRA's state dict"
LORA_RANKS = "reads `r` and `scaling` of LoRA's layers"
LORA_MAMBA = "PEFT refuses modules of Mamba to LoRA's kin, by a list of types without OSF and PSOFT; needs downloads"
LORA_TENSORS = "asserts on LoRA's matrices A and B by name, their ranks as attributes, their scaling or their classes"
MIXED = "PeftMixedModel takes a closed list of PEFT's types, without OSF and PSOFT"
HOTSWAP = "`peft.utils.hotswap` swaps adapters of LoRA alone, and prepares LoRA's layers"
UNMATCHED = "about LoRA's `alpha_pattern`; a `rank_pattern` that matches no module is an error here, no warning"
INVALID_BIAS = "a config refuses it with ValueError, before LoRA's model would; OSF and PSOFT have no `bias`"
MISSING = "names a tensor of LoRA; a checkpoint that lacks one is an error here, no warning"
DIFFUSERS = "needs a pipeline of diffusers, which is not installed"
ONE_REPLACES = (
    "two adapters that each take the place of the weight have no sum; activating both raises ValueError. "
    "OSF computes with the first one alone, and PEFT skips its merges here; PSOFT passes"
)
ONE_ROW = (
    "the Conv1D has one output: the unit vector on that side has one entry, 1 or -1, and no step turns it. "
    "OSF leaves a Conv1D out and has nothing to train; PSOFT raises ValueError for it"
)
NO_SUM = "a weighted sum of two weights has no factors of their size; asking for one raises SpectralError"
DISPATCH = "registers layers of LoRA's by a private method of LoraConfig, which OSFConfig and PsoftConfig lack as well"
REPR = "the names and sizes that LoRA's matrices print; OSF and PSOFT adapt neither a Conv1D nor an embedding"
SUMS = "neither OSF nor PSOFT adds adapters up; "

CUSTOM_MODELS = {
    "TestDynamicDispatch::*": DISPATCH,
    "TestLayerRepr::test_repr_lora_conv1d[*": REPR,
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
        "*::test_inject_from_state_dict_stable_diffusion[*": DIFFUSERS,
        "*::test_inject_from_state_dict_missing_keys_warning[*": LORA_KEYS,
        "*::test_inject_from_state_dict_model_with_weight_conversion[*": LORA_KEYS,
        "*::test_prefix_removal_is_undone[*": LORA_KEYS,
        "*::test_save_pretrained_warns_for_unsharded_state_dict[*": LORA_KEYS,
    },
    "suite_tuners_utils": {
        "*::test_add_second_adapter_with_all_linear_works[*": LORA_LAYERS,
        "*::test_module_type_large[*": LORA_LAYERS,
        "*::test_*requires_grad_*irregular[*": LORA_KEYS,
        "*::test_nb_params_*[*": COUNTS,
        "*::test_model_status_with_*": COUNTS,
        "*::test_model_with_injected_layers[*": COUNTS,
        "*::test_mixed_model_raises[*": MIXED,
        "TestRankAndAlphaPattern::*": LORA_RANKS,
        "*::test_prefixes_select_correct_state_dict_keys[*": LORA_KEYS,
        **{
            f"*::test_{test}_large[{method}]": ONE_REPLACES
            for method in ("SST", "SCT")
            for test in ("merge_adapters", "model_merged_adapters")
        },
    },
    "suite_mixed": {
        f"*::test_{test}[*": MIXED
        for test in (
            "decoder_model",
            "delete_active_adapter_keeps_remaining_adapter_active",
            "delete_adapter",
            "delete_merged_adapter_is_atomic",
            "get_nb_trainable_parameters",
            "incompatible_config_raises",
            "modules_to_save",
            "unload_modules_to_save_when_active_adapter_does_not_use_it",
        )
    },
    "suite_torch_compile": {
        f"*::test_causal_lm_{test}_compile[{method}]": reason
        for method in ("SST", "SCT")
        for test, reason in (
            ("merging_multiple_lora_adapters", ONE_REPLACES),
            ("add_weighted_adapter_lora_adapter", NO_SUM),
        )
    },
    "suite_config": {"TestLoraNestedConfigRoundTrip::*": "loads the configs of LoRA's variants within LoRA's"},
    "suite_initialization": {
        **{
            f"TestLoraInitialization::test_{test}[*": LORA_TENSORS
            for test in (
                "lora_linear_init_default",
                "lora_linear_false",
                "lora_embedding_default",
                "lora_embedding_false",
            )
        },
        "TestLoraInitialization::test_rank_alpha_pattern_override[*": LORA_RANKS,
        "TestLoraInitialization::test_lora_with_bias_argument[*-invalid]": INVALID_BIAS,
        "TestLoraInitialization::test_*_mamba_modules[*": LORA_MAMBA,
        "TestLoraInitialization::test_unmatched_*": UNMATCHED,
        "TestLoraInitialization::test_partially_matched_*": UNMATCHED,
        "TestLoraInitialization::test_misconfigured_second_adapter_*": UNMATCHED,
        "*::test_no_infinite_recursion[*PeftMixedModel]": MIXED,
        "*::test_mixed_model_from_pretrained_*": MIXED,
        "test_from_pretrained_missing_keys_warning[*": MISSING,
        "TestCordaInitialization::test_lora_corda_conv1d_gpt2[*": "calibrates LoRA's CorDA",
        **{
            f"TestHotSwapping::test_{test}[*": HOTSWAP
            for test in (
                "hotswap_allowed_when_other_adapter_merged",
                "hotswap_extra_key_raises",
                "hotswap_missing_key_works",
                "hotswap_raises_when_target_adapter_merged",
                "hotswap_works",
                "hotswap_works_different_ranks_alphas",
            )
        },
        **{
            f"TestHotSwapping::test_prepare_model_for_compiled_hotswap_{test}[*": HOTSWAP
            for test in (
                "conserves_requires_grad",
                "does_not_change_output",
                "lower_rank_padding_raises",
                "model_already_compiled_ignore",
                "model_already_compiled_warns",
                "rank_padding_works",
                "same_rank_padding_works",
                "scalings_are_tensors",
                "scalings_update_config",
                "with_rank_pattern",
            )
        },
        "TestScaling::*": "sets and reads the scaling of LoRA's layers; updates have none",
    },
    "suite_custom_models": CUSTOM_MODELS,
    "suite_decoder_models": {
        **{
            f"*::test_merge_layers_multi[{kwargs}-*": ONE_REPLACES
            for kwargs in ("SSTConfig-config_kwargs2", "KeptSCTConfig")
        },
    },
}
