#!/usr/bin/env bash
# Trains the transformer of the bundled model: latents, a velocity model, its distillation into a model of four steps,
# sharpened by a discriminator, and a grid. It needs no network.
#
#     bash examples/train_class_cond/train_emoji64.sh outputs/emoji64 outputs/autoencoder/vae outputs/emoji64-run
#
# DATA is the output of prepare_emoji.py, VAE the folder of an autoencoder. The same command resumes. In the environment,
# STEPS replaces the optimizer steps of the velocity model, FEW_STEPS those of each of the three distillations, BATCH
# the samples of a step, PYTHON the interpreter. At the end the pipeline, in float16, and the logs are packed into files
# of at most 15 MB: `cat OUTPUT/emoji64.tar.* | tar x`.
set -euo pipefail
DATA=$(realpath "${1:?the folder of the dataset}")
VAE=$(realpath "${2:?the folder of the autoencoder}")
OUTPUT=$(realpath -m "${3:?the folder of the run}")
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" examples/train_class_cond/precompute_latents.py --dataset_name "$DATA" --vae "$VAE" --output_dir "$OUTPUT/latents"
"$PYTHON" examples/train_class_cond/train_dit.py --latents_dir "$OUTPUT/latents" \
    --transformer_config examples/train_class_cond/emoji64.json --recipe fast --learning_rate 2.5e-3 \
    --flip_probability 0 --total_batch_size "${BATCH:-64}" --max_train_steps "${STEPS:-10000}" \
    --mixed_precision bf16 --compile_blocks --validation_steps 1000 --output_dir "$OUTPUT/run"
distil() {  # NAME START STEPS BATCH [FLAGS]
    "$PYTHON" examples/train_class_cond/train_dit.py --latents_dir "$OUTPUT/latents" \
        --pretrained_model_name_or_path "$OUTPUT/$2/pipeline" --pretrained_teacher_model "$OUTPUT/run/pipeline" \
        --recipe distillation --target_guidance_scale 4.5 --target_guidance_start 0.55 --flip_probability 0 \
        --max_train_steps "${FEW_STEPS:-$3}" --total_batch_size "${BATCH:-$4}" \
        --mixed_precision bf16 --compile_blocks --validation_steps 1000 --output_dir "$OUTPUT/$1" "${@:5}"
}
distil few run 3000 24
distil sharp-1 few 2200 16 --adversarial_weight 1 --flow_matching_ratio 0.25 --learning_rate 5e-4
distil sharp-2 sharp-1 2600 16 --adversarial_weight 2 --flow_matching_ratio 0.25 --learning_rate 5e-4
"$PYTHON" - "$OUTPUT" <<'CODE'
import sys

import torch
from dit_hf import DiTClassCondPipeline

output = sys.argv[1]
pipe = DiTClassCondPipeline.from_pretrained(f"{output}/sharp-2/pipeline")
velocity = {"num_inference_steps": 25, "guidance_scale": 4.5, "guidance_interval": (0.0, 0.5)}
pipe.register_to_config(recommended_call=velocity | {"num_jumps": 4})
pipe.to(torch.float16).save_pretrained(f"{output}/emoji64")
CODE
"$PYTHON" examples/generate.py --pipeline "$OUTPUT/emoji64" --output "$OUTPUT/grid.png"
for run in run few sharp-1 sharp-2; do cp "$OUTPUT/$run/train_log.jsonl" "$OUTPUT/emoji64/$run.jsonl"; done
rm -f "$OUTPUT"/emoji64.tar.*
tar -C "$OUTPUT" -c emoji64 | split -b 15m - "$OUTPUT/emoji64.tar."
echo "Packed: $(ls "$OUTPUT"/emoji64.tar.*)"
