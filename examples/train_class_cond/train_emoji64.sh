#!/usr/bin/env bash
# Trains the transformer of the bundled model: latents, training, a grid. It needs no network.
#
#     bash examples/train_class_cond/train_emoji64.sh outputs/emoji64 outputs/autoencoder/vae outputs/emoji64-run
#
# DATA is the output of prepare_emoji.py, VAE the folder of an autoencoder. The same command resumes. STEPS and BATCH in
# the environment replace the number of optimizer steps and their samples, PYTHON the interpreter. At the end the
# pipeline, in float16, and the log are packed into files of at most 15 MB: `cat OUTPUT/emoji64.tar.* | tar x`.
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
"$PYTHON" - "$OUTPUT" <<'CODE'
import sys

import torch
from dit_hf import DiTClassCondPipeline

output = sys.argv[1]
pipe = DiTClassCondPipeline.from_pretrained(f"{output}/run/pipeline")
pipe.to(torch.float16).save_pretrained(f"{output}/emoji64")
CODE
"$PYTHON" examples/generate.py --pipeline "$OUTPUT/emoji64" --output "$OUTPUT/grid.png"
cp "$OUTPUT/run/train_log.jsonl" "$OUTPUT/emoji64/"
rm -f "$OUTPUT"/emoji64.tar.*
tar -C "$OUTPUT" -c emoji64 | split -b 15m - "$OUTPUT/emoji64.tar."
echo "Packed: $(ls "$OUTPUT"/emoji64.tar.*)"
