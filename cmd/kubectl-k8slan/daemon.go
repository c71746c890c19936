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

// endTimeout is how long a program in a pod may take to end after its standard input has.
const endTimeout = 5 * time.Second

// daemons are the daemon's pods that run.
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

// daemonPod is the daemon's pod on a node, where programs can look at LANs.
type daemonPod struct {
	daemons
	node, pod string
}

func (d daemons) on(node string) (daemonPod, error) {
	pod, ok := d.pods[node]
	if !ok {
		return daemonPod{}, fmt.Errorf("k8slan has no pod that runs on node %s in namespace %s; give --system-namespace if it is installed elsewhere, or see kubectl get pods -n %[2]s -o wide",
			node, d.system)
	}
	return daemonPod{daemons: d, node: node, pod: pod}, nil
}

// daemonOn finds the pod.
func (c cluster) daemonOn(ctx context.Context, node, system string) (daemonPod, error) {
	all, err := c.daemons(ctx, system)
	if err != nil {
		return daemonPod{}, err
	}
	return all.on(node)
}

// explainForbidden adds to an error for want of rights what is needed.
func (d daemons) explainForbidden(err error) error {
	if !apierrors.IsForbidden(err) {
		return err
	}
	return fmt.Errorf("%w; this runs a program in k8slan's pods on the nodes, for which you need, in namespace %s, the verb list on pods, and create and get on pods/exec. "+
		"That is as much as root on the nodes; ask who runs the cluster", err, d.system)
}

// run runs a program of k8slan's image until it ends or, some seconds after its standard input has ended with ctx, is given up.
// It ends by itself where this program is killed, because its standard input ends then, too.
func (d daemonPod) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, args ...string) error {
	core, err := kubernetes.NewForConfig(d.config)
	if err != nil {
		return fmt.Errorf("make a client: %w", err)
	}
	request := core.CoreV1().RESTClient().Post().Resource("pods").Namespace(d.system).Name(d.pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: "node", Command: append([]string{"/k8slan"}, args...), Stdin: true, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	// As kubectl does: SPDY where something on the way does not know WebSockets.
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
	// The program is told to end by the end of its standard input, so that it can say what it has to say.
	input, inputEnd := io.Pipe()
	defer inputEnd.Close() // this end, or the client's library complains
	go func() {
		_, err := io.Copy(inputEnd, stdin)
		_ = inputEnd.CloseWithError(err)
	}()
	defer context.AfterFunc(ctx, func() { inputEnd.Close() })()
	late, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(endTimeout, cancel) })()
	if err := executor.StreamWithContext(late, remotecommand.StreamOptions{Stdin: input, Stdout: stdout, Stderr: stderr}); err != nil {
		return d.explainForbidden(fmt.Errorf("run k8slan %s in pod %s/%s on node %s: %w", args[0], d.system, d.pod, d.node, err))
	}
	return nil
}
