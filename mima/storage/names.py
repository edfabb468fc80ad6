"""The names of the files that adapters, models and evaluations are written to."""

MODEL_INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
CUSTOM_DIFFUSION_FILE = "pytorch_custom_diffusion_weights.safetensors"
WORD_FILE = "learned_embeds.safetensors"
DELTA_FILE = "model_delta.safetensors"
EVALUATION_FILE = "evaluation.json"
