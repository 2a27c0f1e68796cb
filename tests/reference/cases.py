"""The tiny models of the references: committed ones by name, and random ones for parity loops."""

import copy

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "kv_lora_rank": 16,
    "max_position_embeddings": 128,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 3,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 10,
    "vocab_size": 64,
}

V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "hidden_size": 36,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_method": "group_limited_greedy",
}
del V2["num_nextn_predict_layers"]

# GLM-4.7-Flash: values are wider than keys, no groups, and what the released configuration leaves out.
GLM = V3 | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "n_group": 1,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "v_head_dim": 22,
}
del GLM["moe_layer_freq"], GLM["scoring_func"]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 64,
}


def yarn(factor, original, mscale, all_dim):
    return {
        "max_position_embeddings": original * factor,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": factor,
            "mscale": mscale,
            "mscale_all_dim": all_dim,
            "original_max_position_embeddings": original,
            "type": "yarn",
        },
    }


FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
FP8_SHAPE = {
    "hidden_size": 136,
    "intermediate_size": 144,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "topk_group": 1,
    "v_head_dim": 24,
}


class Case:
    """config: config.json; spelling: "released" or "transformers" (rope_parameters); storage: dtype on disk."""

    def __init__(self, config, spelling="released", storage="float32", shards=1, gradients=True, **data):
        self.config = copy.deepcopy(config)
        self.spelling, self.storage, self.shards, self.gradients = spelling, storage, shards, gradients
        self.batch, self.length, self.new_tokens, self.lengths = 2, 20, 24, None
        self.__dict__.update(data)

    @property
    def depth(self):
        return 0 if self.spelling == "transformers" else self.config.get("num_nextn_predict_layers", 0)


CASES = {
    "v3": Case(V3 | {"num_hidden_layers": 3}),
    # A small base, so that YaRN's ramp between kept and interpolated frequencies has several steps.
    "v3-yarn": Case(V3 | yarn(4, 16, 1.0, 1.0) | {"qk_rope_head_dim": 32, "rope_theta": 100.0}, length=28),
    "v3-noq": Case(V3 | {"q_lora_rank": None, "n_routed_experts": 6, "n_group": 1, "topk_group": 1}),
    "glm": Case(GLM | {"num_hidden_layers": 3}, spelling="transformers"),
    "v2-group": Case(V2 | yarn(4, 16, 0.707, 0.707)),
    "v2-lite": Case(
        V2
        | yarn(40, 4096, 0.707, 0.707)
        | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    ),
    "v3-mtp1": Case(V3 | {"num_nextn_predict_layers": 1}),
    "v3-mtp2": Case(V3 | {"num_nextn_predict_layers": 2, "hidden_size": 24}),
    "v3-half": Case(V3 | yarn(4, 16, 0.5, 1.0) | {"rope_interleave": False}, spelling="transformers"),
    "v3-tied": Case(V3 | {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}, spelling="transformers"),
    "v3-ragged": Case(
        V3
        | {
            "attention_bias": True,
            "hidden_size": 24,
            "n_routed_experts": 16,
            "moe_intermediate_size": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 16,
        },
        batch=3,
        lengths=[20, 11, 2],
    ),
    "llama-gqa": Case(LLAMA),
    "llama-mha": Case(
        LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "rope_theta": 500000.0},
        spelling="transformers",
    ),
    "llama-mqa": Case(LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
    "v3-sharded": Case(V3, shards=3, gradients=False),
    "v3-bf16": Case(V3 | {"torch_dtype": "bfloat16"}, storage="bfloat16", gradients=False),
    "v3-fp16": Case(V3 | {"torch_dtype": "float16"}, storage="float16", gradients=False),
    "v3-fp8": Case(
        V3 | FP8_SHAPE | {"torch_dtype": "bfloat16", "quantization_config": FP8}, storage="fp8", gradients=False
    ),
}


def random_case(rng):
    """Another shape: odd head counts, RoPE of 8 to 128 dimensions, 1 to 64 experts, rows of several lengths."""
    family = rng.choice(["v3", "v3", "v3", "v2", "llama"])
    heads = rng.choice([1, 2, 3, 5, 7])
    spelling = rng.choice(["released", "transformers"])
    length = rng.randint(6, 40)
    batch = rng.randint(1, 4)
    lengths = None
    if batch > 1 and rng.random() < 0.6:
        lengths = [length] + [rng.randint(1, length) for _ in range(batch - 1)]
    if family == "llama":
        groups = rng.choice([g for g in (1, 2, 3, 5, 7) if heads % g == 0])
        config = LLAMA | {
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "hidden_size": heads * 2 * rng.randint(4, 12),
            "intermediate_size": rng.randint(20, 90),
            "attention_bias": rng.random() < 0.3,
            "rope_theta": rng.choice([10000.0, 500000.0]),
        }
        if rng.random() < 0.5:
            config["head_dim"] = 2 * rng.randint(4, 40)
    else:
        config = (V3 if family == "v3" else V2) | deepseek_shape(rng, family, heads)
        if family == "v3" and spelling == "released":
            config["num_nextn_predict_layers"] = rng.choice([0, 0, 1, 2])
    config |= {
        "num_hidden_layers": rng.randint(1, 4),
        "tie_word_embeddings": rng.random() < 0.3,
        "vocab_size": rng.randint(40, 150),
    }
    return Case(
        config, spelling, batch=batch, length=length, lengths=lengths, new_tokens=rng.randint(4, 20), shards=rng.randint(1, 3)
    )


def deepseek_shape(rng, family, heads):
    experts = rng.choice([1, 2, 3, 4, 8, 16, 32, 64])
    n_group, topk_group = 1, 1
    if experts >= 4 and rng.random() < 0.6:
        n_group = rng.choice([g for g in (2, 4, 8) if experts % g == 0 and experts // g >= 2])
        topk_group = rng.randint(1, n_group)
    reachable = experts // n_group * topk_group
    shape = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": heads * rng.randint(24 // heads + 1, 96 // heads),
        "intermediate_size": rng.randint(16, 80),
        "moe_intermediate_size": rng.randint(3, 24),
        "q_lora_rank": rng.choice([None, rng.randint(8, 48)]),
        "kv_lora_rank": rng.randint(8, 48),
        "qk_nope_head_dim": rng.randint(4, 40),
        "qk_rope_head_dim": rng.choice([8, 16, 24, 32, 64, 128]),
        "v_head_dim": rng.randint(4, 40),
        "first_k_dense_replace": rng.randint(0, 2),
        "n_routed_experts": experts,
        "n_shared_experts": rng.randint(1, 2),
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": rng.randint(1, min(8, reachable)),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "attention_bias": rng.random() < 0.2,
    }
    if family == "v3":
        shape |= {"rope_interleave": rng.random() < 0.7, "norm_topk_prob": rng.random() < 0.7}
    else:
        shape["topk_method"] = "group_limited_greedy" if n_group > 1 else "greedy"
        # transformers' V2 rotates complex numbers, which must lie at even strides.
        for key in ("kv_lora_rank", "qk_nope_head_dim"):
            shape[key] += shape[key] % 2
    if rng.random() < 0.4:
        mscale = rng.choice([0.707, 1.0])
        shape["rope_theta"] = rng.choice([100.0, 1000.0, 10000.0])
        shape |= yarn(rng.choice([4, 8]), 16, mscale, rng.choice([mscale, 0.5]))
    return shape
