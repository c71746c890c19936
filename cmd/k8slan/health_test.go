package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestReadinessSaysWhatIsMissing(t *testing.T) {
	lans, kubelet := errors.New("LANs are not built yet"), error(nil)
	handler := healthHandler([]func(context.Context) error{
		func(context.Context) error { return lans },
		func(context.Context) error { return kubelet },
	})
	get := func(path string) (int, string) {
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, httptest.NewRequest(http.MethodGet, path, nil))
		return response.Code, response.Body.String()
	}
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || text != "LANs are not built yet\n" {
		t.Errorf("not ready: %d %q", code, text)
	}
	if code, text := get("/healthz"); code != http.StatusOK || text != "ok\n" {
		t.Errorf("not ready but healthy: %d %q", code, text)
	}
	lans = nil
	if code, text := get("/readyz"); code != http.StatusOK || text != "ok\n" {
		t.Errorf("ready: %d %q", code, text)
	}
}
