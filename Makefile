# Everything that is built, generated, checked and tested. `make help` lists it.
SHELL := /bin/bash -o pipefail
export PATH := $(PATH):/usr/local/go/bin
# One set of build flags for programs, tests and tools, so that they share what is compiled.
export CGO_ENABLED := 0
export GOFLAGS := -trimpath

VERSION := $(or $(shell git describe --tags --always --dirty 2>/dev/null | sed s/^v//),unknown)
GOLANGCI_LINT := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
CLUSTER := go run ./test/cluster/cmd/cluster
HELM = $$($(CLUSTER) build helm)/helm
# Largest size of bin/k8slan-cni in bytes: it is started for every attachment.
CNI_MAX := 5000000

# In CI a skipped test is a failure, and no cached result counts.
export K8SLAN_NO_SKIP := $(if $(CI),1)
GOTEST := go run ./test/report $(if $(CI),-count 1)

.DEFAULT_GOAL := help
# Tests measure, and some build what others use: one after the other.
.NOTPARALLEL:

##@ Build

.PHONY: build
build: ## Build bin/k8slan, bin/k8slan-cni and bin/kubectl-k8slan, static
	go build -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

.PHONY: image
image: build ## Write the image as an OCI archive, dist/k8slan.tar; needs no Docker
	go run ./build/cmd/image --version '$(VERSION)' --output dist/k8slan.tar

.PHONY: manifests
manifests: ## Write all.yaml, the chart as one file for kubectl apply -f
	$(HELM) template k8slan charts/k8slan --namespace k8slan-system --include-crds --no-hooks --kube-version 1.31.0 \
		--set createNamespace=true --set-string 'image.tag=$(VERSION)' > all.yaml

.PHONY: generate
generate: ## Generate deepcopy functions, CRDs and their copy in the chart, and docs/rights.md
	go generate ./crd/...
	go test ./test/chart -run TestRightsPage -update

##@ Cluster, as root

.PHONY: demo
demo: ## Bring the cluster up, install k8slan, let two pods and a VM talk
	@echo 'building the demo: the first time, Go downloads modules, which bin/demo.log lists'
	@mkdir -p bin
	@go build -o bin/demo ./test/demo 2> bin/demo.log || { cat bin/demo.log; exit 1; }
	@bin/demo

.PHONY: cluster
cluster: ## Bring up a two-node Kubernetes on this machine; the first time builds it
	$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## Take it down; nothing stays but caches
	$(CLUSTER) down

##@ Test

.PHONY: test
test: unit core ## Show every promise of the README once, as root; with verify, what CI runs

.PHONY: test-all
test-all: unit api dataplane e2e ## Run every test, as root

.PHONY: core
core: ## Run the tests that test/*/core.txt list
	$(GOTEST) -core test/api/core.txt -name 'api, core' -budget 90s -timeout 15m ./test/api
	$(GOTEST) -core test/dataplane/core.txt -name 'data plane, core' -budget 150s -timeout 15m -p 1 ./test/netlab ./test/dataplane
	$(GOTEST) -core test/e2e/core.txt -name 'end to end, core' -budget 6m -timeout 30m ./test/e2e

.PHONY: unit
unit: ## Run the tests that need neither root nor a cluster
	go vet ./...
	$(GOTEST) -name unit -budget 2m $$(go list ./... | grep -v -E '/test/(api|dataplane|netlab|soak|bench|images/vm|e2e)$$')

.PHONY: api
api: ## Test objects and controller against a real kube-apiserver
	$(GOTEST) -name api -budget 2m -timeout 30m ./test/api

.PHONY: dataplane
dataplane: ## Send real frames through LANs in network namespaces
	$(GOTEST) -name 'data plane' -budget 7m -timeout 30m -p 1 \
		./test/netlab ./test/images/vm ./test/dataplane ./test/soak ./test/bench

.PHONY: e2e
e2e: ## Test everything on the cluster; FOCUS=<regexp> names tests, UNDERLAY=routed6 has unicast, evpn4 EVPN
	$(GOTEST) -name 'end to end' -budget 20m -timeout 1h -run '$(FOCUS)' ./test/e2e $(if $(UNDERLAY),-underlay $(UNDERLAY))

.PHONY: bench
bench: ## Measure the speed against floors and peers, as root: a table, and bench.json; FOCUS=B8
	go test -c -o bin/bench.test ./test/bench
	cd test/bench && nice -n -10 ../../bin/bench.test -long -test.timeout 2h -test.run 'TestPerformance/$(FOCUS)' -json $(CURDIR)/bench.json

.PHONY: soak
soak: ## Attach 10,000 times while daemon and plugin are killed, and 1,000 times while LANs are deleted; CYCLES=, SEED=
	go test -c -o bin/soak.test ./test/soak
	cd test/soak && ../../bin/soak.test -test.timeout 3h -cycles $(or $(CYCLES),10000) -seed $(or $(SEED),$$RANDOM)
	$(GOTEST) -timeout 1h -run TestLANIsDeletedWhileAPodAttaches ./test/dataplane -tries 1000

.PHONY: verify
verify: generate lint build ## Check generated code, modules, style, imports and the size of the CNI plugin
	git diff --exit-code -- crd charts docs/rights.md || { echo 'make generate changed these files: commit them'; exit 1; }
	go mod tidy -diff
	! go list -deps ./cmd/k8slan-cni | grep -E 'k8s.io/|fsnotify|mdlayher|golang.org/x/(net/bpf|time)' || { echo 'the CNI plugin must not link these'; exit 1; }
	test $$(stat -c %s bin/k8slan-cni) -le $(CNI_MAX) || { ls -l bin/k8slan-cni; echo 'is larger than $(CNI_MAX) bytes'; exit 1; }
	$(HELM) lint --strict --quiet charts/k8slan

.PHONY: lint
lint: ## Check words, style and import arrows
	go run ./test/style
	$(GOLANGCI_LINT) run ./...

.PHONY: format
format: ## Format the code as lint wants it
	$(GOLANGCI_LINT) fmt ./...

##@ Other

.PHONY: clean
clean: ## Remove what was built here; caches stay
	rm -rf bin dist all.yaml bench.json

.PHONY: help
help: ## Show this
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
