#!/bin/sh
# Counts up in a variable of this shell: a restored counter goes on, a restarted one begins at 1.
trap 'exit 0' TERM
n=0
while :; do
	n=$((n + 1))
	echo "count $n"
	sleep 0.1
done
