package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

// serveHealth has the manager answer /healthz, with 200 while it runs, and /readyz, with 200 or with 503 and the
// sentences of the checks that fail.
func (f *daemonFlags) serveHealth(mgr ctrl.Manager, ready ...func(context.Context) error) error {
	if f.healthAddress == "0" {
		return nil
	}
	listener, err := net.Listen("tcp", f.healthAddress)
	if err != nil {
		return fmt.Errorf("answer /healthz and /readyz (--health-address): %w", err)
	}
	return mgr.Add(&manager.Server{
		Name:     "health",
		Server:   &http.Server{Handler: healthHandler(ready), ReadHeaderTimeout: 10 * time.Second},
		Listener: listener,
	})
}

func healthHandler(ready []func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		var errs []error
		for _, check := range ready {
			errs = append(errs, check(r.Context()))
		}
		answer(w, errors.Join(errs...))
	})
	return mux
}

func answer(w http.ResponseWriter, err error) {
	text := "ok"
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err != nil {
		text = err.Error()
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = fmt.Fprintln(w, text) // the caller is gone: nobody to tell
}
