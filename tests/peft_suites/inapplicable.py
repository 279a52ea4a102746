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
    ),
    "suite_decoder_models": (
        "*::test_training_decoders_layer_indexing[*",
        "*::test_training_decoders_gradient_checkpointing[*",
    ),
    "suite_tuners_utils": (
        "TestModelAndLayerStatus::test_requires_grad_*[*",
        "TestModelAndLayerStatus::test_model_requires_*[*",
    ),
}

COUNTS = "counts the parameters of LoRA's two matrices, all of which train, in figures"
LORA_LAYERS = "expects LoRA's layers for convolutions and embeddings, and two nn.Linear in each"
LORA_KEYS = "takes a tensor by its name in LoRA's state dict"
LORA_RANKS = "reads `r` and `scaling` of LoRA's layers"
LORA_MAMBA = "PEFT refuses modules of Mamba to LoRA's kin, by a list of types without OSF and PSOFT; needs downloads"
LORA_TENSORS = "asserts on LoRA's matrices A and B by name, their ranks as attributes, their scaling or their classes"
MIXED = "PeftMixedModel takes a closed list of PEFT's types, without OSF and PSOFT"
HOTSWAP = "`peft.utils.hotswap` swaps adapters of LoRA alone, and prepares LoRA's layers"
UNMATCHED = (
    "about `alpha_pattern` too, which LoRA has; a `rank_pattern` that matches no module is an error here, no warning"
)
INVALID_BIAS = "a config refuses it with ValueError, before LoRA's model would; OSF and PSOFT have no `bias`"
MISSING = "names a tensor of LoRA; a checkpoint that lacks one is an error here, no warning"
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
}

ONE_REPLACES = "two adapters that each take the place of the weight have no sum; activating both raises ValueError"
NO_SUM = "a weighted sum of two weights has no factors of their size; asking for one raises SpectralError"
ONE_ROW = "the Conv1D has one output: the unit vector on that side has one entry, and a step cannot turn it"

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
