// Command k8slan-cni is the CNI plugin of k8slan. Its file name on a node is k8slan.
package main

import (
	"cmp"
	"context"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/kernel"
)

// timeout limits one request. kubelet waits four minutes for a sandbox with all its networks (twice
// --runtime-request-timeout), and then tries again.
const timeout = 60 * time.Second

// version is k8slan's version, set at build time.
var version = "development"

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	run := cmp.Or(os.Getenv("K8SLAN_RUN_DIR"), kernel.DefaultRun)
	plugin := cni.New(kernel.New(kernel.Paths{Run: run}), cni.Host{
		Run:    run,
		CDI:    cmp.Or(os.Getenv("K8SLAN_CDI_DIR"), cdi.DefaultDir),
		Env:    os.Environ(),
		Stdout: os.Stdout,
		// The attachment does not depend on its metrics: while the daemon is not running, nothing is counted.
		Report: func(o report.Outcome) { _ = report.Send(run, o) },
	})
	skel.PluginMainFuncs(plugin.Funcs(ctx), cniversion.All, "CNI plugin k8slan "+version)
}
