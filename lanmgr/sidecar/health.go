package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// serve answers /health and /config until ctx ends.
func (s *Sidecar) serve(ctx context.Context, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		const hint = "http_address; another container of the pod may have it"
		return fmt.Errorf("answer /health and /config (%s): %w", hint, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", s.answerHealth)
	mux.HandleFunc("GET /config", s.answerConfig)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("answer /health and /config: %w", err)
	}
	return nil
}

func (s *Sidecar) answerHealth(w http.ResponseWriter, _ *http.Request) {
	if err := s.Health(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Sidecar) answerConfig(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	config := s.config
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(config); err != nil {
		s.Log.Warn("cannot answer /config", "err", err)
	}
}

// Health returns why the pod is not in the LAN; nil: it is. While the interface has peers, an API server that does not
// answer makes no difference: the peers stay.
func (s *Sidecar) Health() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.buildErr != nil:
		return s.buildErr
	case !s.built:
		return errors.New("the interface does not exist yet")
	case s.remotes > 0:
		return nil
	case s.endpointsErr != nil && (s.endpoints == nil || s.evpn != nil):
		return s.endpointsErr
	case s.endpoints == nil:
		return errors.New("the Services' endpoints are not known yet")
	case s.evpn != nil:
		return sessionsErr(s.evpn.Sessions())
	}
	return nil
}
