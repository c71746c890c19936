# Everything that is built, generated, checked and tested. `make help` lists it.
SHELL := /bin/bash -o pipefail
export PATH := $(PATH):/usr/local/go/bin
VERSION := $(shell git describe --tags --always --dirty)
ARCH    := $(shell go env GOARCH)

# In CI a test that cannot run fails, and the log names every test.
export K8SLAN_NO_SKIP := $(if $(CI),1)
GOTEST := go test $(if $(CI),-v)

.DEFAULT_GOAL := help

##@ Build

.PHONY: build
build: ## Build bin/k8slan and bin/k8slan-cni, static
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

##@ Test

.PHONY: test
test: unit ## Run every test: what CI runs

.PHONY: unit
unit: ## Run the tests that need neither root nor a cluster
	go vet ./...
	$(GOTEST) ./...

##@ Other

.PHONY: clean
clean: ## Remove what was built here; caches stay
	rm -rf bin dist all.yaml

.PHONY: help
help: ## Show this
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
