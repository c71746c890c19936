package pki

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
)

func TestServerAndClientTrustEachOther(t *testing.T) {
	authority, err := NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	server, err := authority.Issue(Subject{Name: "server", Hosts: []string{"server.test", "10.77.0.1", "fd77::1"}})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority.Cert) {
		t.Fatal("the authority's certificate is not readable")
	}
	if _, err := tls.X509KeyPair(server.Cert, server.Key); err != nil {
		t.Fatal(err)
	}
	cert, err := parse(server.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for host, usage := range map[string]x509.ExtKeyUsage{
		"server.test": x509.ExtKeyUsageServerAuth,
		"10.77.0.1":   x509.ExtKeyUsageServerAuth,
		"fd77::1":     x509.ExtKeyUsageServerAuth,
		"":            x509.ExtKeyUsageClientAuth,
	} {
		_, err := cert.Verify(x509.VerifyOptions{DNSName: host, Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
		if err != nil {
			t.Errorf("as %q: %v", host, err)
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{DNSName: "10.77.0.2", Roots: roots}); err == nil {
		t.Error("the certificate is good for an address it was not made for")
	}
}

func TestGroupsAreKubernetesGroups(t *testing.T) {
	authority, err := NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(Subject{Name: "system:node:worker1", Group: "system:nodes"})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := parse(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	// authentication.k8s.io: the user is the common name, groups are the organizations.
	if cert.Subject.CommonName != "system:node:worker1" || len(cert.Subject.Organization) != 1 ||
		cert.Subject.Organization[0] != "system:nodes" {
		t.Errorf("subject %v", cert.Subject)
	}
}
