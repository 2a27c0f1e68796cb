#!/usr/bin/env bash
# Greedy text with and without MTP drafts over many prompts: must be equal, and what it gains.
#   mtp_against_plain.sh MODEL TEXT [PROMPTS] [TOKENS]
# Prompts are the first words of lines spread over TEXT. The two decodings take turns.
set -euo pipefail
model=$1 text=$2 prompts=${3:-100} tokens=${4:-100}
latente=${LATENTE:-build/release/apps/latente/latente}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lines=$(grep -c . "$text")
equal=0
for ((i = 0; i < prompts; i++)); do
  prompt=$(grep . "$text" | sed -n "$((i * lines / prompts + 1))p" | cut -d' ' -f1-8)
  $latente generate "$model" -p "$prompt" -n "$tokens" -t 0 --stats >"$work/mtp" 2>>"$work/mtp.stats"
  $latente generate "$model" -p "$prompt" -n "$tokens" -t 0 --stats --plain >"$work/plain" 2>>"$work/plain.stats"
  cmp -s "$work/mtp" "$work/plain" && equal=$((equal + 1)) || echo "differs: $prompt"
done
median() { sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
figure() { sed -n "s/$2/\1/p" "$work/$1.stats"; }
mtp=$(figure mtp '^decode .* tokens, \([0-9.]*\) tok\/s.*' | median)
plain=$(figure plain '^decode .* tokens, \([0-9.]*\) tok\/s.*' | median)
echo "equal texts         $equal of $prompts"
echo "drafts accepted     $(figure mtp '^drafts .*(\([0-9.]*\) %).*' | median) % (median)"
echo "tokens a pass       $(figure mtp '^decode .* \([0-9.]*\) tokens a pass.*' | median)"
echo "tokens a second     $mtp with drafts, $plain without: $(awk "BEGIN{printf \"%.2f\", $mtp/$plain}")x"
[ "$equal" -eq "$prompts" ]
