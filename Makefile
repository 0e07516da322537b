# A thin front for the scripts in .mise/tasks, which also run on their own and
# through mise.

.PHONY: build test lint generate bench fuzz crashtest ci release

build: ; .mise/tasks/build/all
test: ; .mise/tasks/test/all
lint: ; .mise/tasks/lint/all
generate: ; .mise/tasks/generate/all
bench: ; .mise/tasks/test/bench
fuzz: ; .mise/tasks/test/fuzz
N ?= 100
crashtest: ; .mise/tasks/test/crash $(N)
ci: ; .ci/run
release: ; .mise/tasks/build/release
