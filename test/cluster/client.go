package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
)

// client speaks to the API server as the administrator.
type client struct {
	http    *http.Client
	address string // of the API server, for the machine
}

func (s state) client() (client, error) {
	ca, err := os.ReadFile(s.pki("ca.crt"))
	if err != nil {
		return client{}, fmt.Errorf("read the cluster's authority: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(s.pki("admin.crt"), s.pki("admin.key"))
	if err != nil {
		return client{}, fmt.Errorf("read the administrator's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}},
		DisableKeepAlives: true, // no connection outlives its request
	}
	return client{&http.Client{Transport: transport}, s.address()}, nil
}

// get returns the body of a successful answer.
func (c client) get(ctx context.Context, path string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.address+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		response.Body.Close()
		return nil, fmt.Errorf("GET %s: %s", path, response.Status)
	}
	return response.Body, nil
}

// ready returns nil if the API server serves.
func (c client) ready(ctx context.Context) error {
	body, err := c.get(ctx, "/readyz")
	if err != nil {
		return err
	}
	return body.Close()
}

// watched is the part of an event of a watch that is read here.
type watched struct {
	Object struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
			NodeInfo   struct{ BootID string }
		}
	}
}

// waitNodeReady watches a node until it is Ready in the given boot.
func (c client) waitNodeReady(ctx context.Context, name, boot string) error {
	last := errors.New("the node has not registered")
	err := c.watch(ctx, "/api/v1/nodes", name, func(event watched) bool {
		status := event.Object.Status
		for _, condition := range status.Conditions {
			if condition.Type != "Ready" || status.NodeInfo.BootID != boot {
				continue
			}
			if condition.Status == "True" {
				return true
			}
			last = fmt.Errorf("the node is not ready: %s", condition.Message)
		}
		return false
	})
	if err != nil {
		return errors.Join(last, err)
	}
	return nil
}

// waitPodsAllowed watches until pods can be created in namespace default: the
// controller manager makes the service account they need.
func (c client) waitPodsAllowed(ctx context.Context) error {
	return c.watch(ctx, "/api/v1/namespaces/default/serviceaccounts", "default", func(watched) bool { return true })
}

// watch shows every state of an object, the present one first, to done, until
// that returns true.
func (c client) watch(ctx context.Context, collection, name string, done func(watched) bool) error {
	// Without a resource version the first event is the present object.
	body, err := c.get(ctx, collection+"?watch=1&fieldSelector="+url.QueryEscape("metadata.name="+name))
	if err != nil {
		return err
	}
	defer body.Close()
	for events := json.NewDecoder(body); ; {
		var event watched
		if err := events.Decode(&event); err != nil {
			return fmt.Errorf("watch %s in %s: %w", name, collection, err)
		}
		if done(event) {
			return nil
		}
	}
}
