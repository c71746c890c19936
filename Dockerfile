# The image for those who have Docker; make image writes the same without it.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY cni cni
COPY crd crd
COPY deviceplugin deviceplugin
COPY lanmgr lanmgr
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/k8slan ./cmd/k8slan-cni

# busybox for the hooks of sidecars, which are written for a shell and ip.
FROM busybox:1.37-musl
LABEL org.opencontainers.image.title=k8slan \
      org.opencontainers.image.source=https://github.com/k8slan/k8slan \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only"
COPY --from=build /out/k8slan /out/k8slan-cni /
RUN mkdir -p /usr/local/bin && ln -s /k8slan /usr/local/bin/kubelan
ENTRYPOINT ["/k8slan"]
