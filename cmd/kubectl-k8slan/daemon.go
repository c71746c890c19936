package main

import (
	"context"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// endTimeout is how long a program in a pod may take to end after its standard input has ended.
const endTimeout = 5 * time.Second

// daemons are the running pods of the daemon.
type daemons struct {
	cluster
	system string
	pods   map[string]string // by node
}

func (c cluster) daemons(ctx context.Context, system string) (daemons, error) {
	all := daemons{cluster: c, system: system, pods: map[string]string{}}
	var pods corev1.PodList
	err := c.client.List(ctx, &pods, client.InNamespace(system),
		client.MatchingLabels{"app.kubernetes.io/name": "k8slan", "app.kubernetes.io/component": "node"})
	if err != nil {
		return all, all.explainForbidden(fmt.Errorf("list the daemon's pods in namespace %s: %w", system, err))
	}
	for _, p := range pods.Items {
		if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp.IsZero() {
			all.pods[p.Spec.NodeName] = p.Name
		}
	}
	return all, nil
}

// daemonPod is the daemon's pod on a node, in which programs can inspect LANs.
type daemonPod struct {
	daemons
	node, pod string
}

func (d daemons) on(node string) (daemonPod, error) {
	pod, ok := d.pods[node]
	if !ok {
		return daemonPod{}, fmt.Errorf("k8slan has no running pod on node %s in namespace %s; "+
			"give --system-namespace if it is installed in another namespace, or see kubectl get pods -n %[2]s -o wide",
			node, d.system)
	}
	return daemonPod{daemons: d, node: node, pod: pod}, nil
}

// daemonOn returns the daemon's pod on a node.
func (c cluster) daemonOn(ctx context.Context, node, system string) (daemonPod, error) {
	all, err := c.daemons(ctx, system)
	if err != nil {
		return daemonPod{}, err
	}
	return all.on(node)
}

// explainForbidden adds the rights that are needed to an error that says that rights are missing.
func (d daemons) explainForbidden(err error) error {
	if !apierrors.IsForbidden(err) {
		return err
	}
	return fmt.Errorf("%w; this runs a program in k8slan's pods on the nodes. "+
		"In namespace %s you need the verb list on pods, and create and get on pods/exec. "+
		"That is as much as root on the nodes; ask the administrator of the cluster", err, d.system)
}

// run runs a program of k8slan's image until it ends. When ctx ends, run closes the program's standard input, and stops
// waiting after endTimeout. If this process is killed, the program also ends, because its standard input ends.
func (d daemonPod) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, args ...string) error {
	core, err := kubernetes.NewForConfig(d.config)
	if err != nil {
		return fmt.Errorf("make a client: %w", err)
	}
	request := core.CoreV1().RESTClient().Post().Resource("pods").Namespace(d.system).Name(d.pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: "node", Command: append([]string{"/k8slan"}, args...), Stdin: true, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	// Like kubectl, it falls back to SPDY if a proxy does not support WebSockets.
	spdy, err := remotecommand.NewSPDYExecutor(d.config, "POST", request.URL())
	if err != nil {
		return fmt.Errorf("prepare to run a program in pod %s: %w", d.pod, err)
	}
	sockets, err := remotecommand.NewWebSocketExecutor(d.config, "GET", request.URL().String())
	if err != nil {
		return fmt.Errorf("prepare to run a program in pod %s: %w", d.pod, err)
	}
	executor, err := remotecommand.NewFallbackExecutor(sockets, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return fmt.Errorf("prepare to run a program in pod %s: %w", d.pod, err)
	}
	// The end of its standard input makes the program end, so that it can still print its results.
	input, inputEnd := io.Pipe()
	defer inputEnd.Close() // without this, the client library logs an error
	go func() {
		_, err := io.Copy(inputEnd, stdin)
		_ = inputEnd.CloseWithError(err)
	}()
	defer context.AfterFunc(ctx, func() { inputEnd.Close() })()
	late, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(endTimeout, cancel) })()
	streams := remotecommand.StreamOptions{Stdin: input, Stdout: stdout, Stderr: stderr}
	if err := executor.StreamWithContext(late, streams); err != nil {
		return d.explainForbidden(
			fmt.Errorf("run k8slan %s in pod %s/%s on node %s: %w", args[0], d.system, d.pod, d.node, err))
	}
	return nil
}
