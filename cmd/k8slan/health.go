package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

// serveHealth makes the manager answer /healthz and /readyz. /healthz answers with 200 while the manager runs. /readyz
// answers with 200, or with 503 and the errors of the checks that fail.
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
	_, _ = fmt.Fprintln(w, text) // it fails only if the caller has closed the connection
}

// serve answers HTTP requests at an address until ctx ends. The address 0 means none. What names the paths in errors.
func serve(ctx context.Context, tasks *errgroup.Group, address string, handler http.Handler, what string) {
	if address == "0" {
		return
	}
	srv := &http.Server{Addr: address, Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	tasks.Go(func() error {
		if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("answer %s: %w", what, err)
		}
		return nil
	})
	tasks.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
}
