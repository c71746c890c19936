package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/cni/report"
	"github.com/k8slan/k8slan/crd/v1beta1"
	"github.com/k8slan/k8slan/deviceplugin"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/gc"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/metrics"
)

// nodeFlags are the flags of k8slan node.
type nodeFlags struct {
	daemonFlags
	evpnFlags
	node       string
	run        string
	cdi        string
	pluginsDir string
	cniSource  string
	cniDir     string
	megalos    bool
	kubelet    string // socket of its pod resources
	vteps      []net.IPNet
	self       gc.Pod
}

func nodeCommand() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Run the daemon of one node: it builds the LANs and offers their spokes to kubelet",
		Long: `Run the daemon of one node.

It puts the CNI plugin in its place, builds each admitted LAN that the node belongs to, repairs what somebody else changed, offers the LAN's spokes and pools to kubelet as
resources macvtap.k8slan.io/k8slan-veth-<spoke>, and reports in the LANNode object of the node's name. It runs as root in the
node's network namespace. When it ends, the LANs stay; kubelet offers their spokes again when it is back.

/healthz answers while the daemon runs, /readyz once every LAN was worked on and kubelet knows every spoke.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.node == "" {
				return usageError{errors.New("the node has no name: give --node-name or set NODE_NAME")}
			}
			if f.reflectors != "" && f.self.Namespace == "" {
				return usageError{errors.New("--evpn-reflectors names a Service of the daemon's own namespace: give --pod-namespace or set POD_NAMESPACE")}
			}
			return f.runNode(cmd.Context())
		},
	}
	f.daemonFlags.add(cmd.Flags())
	f.evpnFlags.add(cmd.Flags())
	cmd.Flags().StringVar(&f.node, "node-name", os.Getenv("NODE_NAME"), "`name` of the Node object (environment: NODE_NAME)")
	cmd.Flags().IPNetSliceVar(&f.vteps, "vtep-cidrs", nil,
		"`ranges` of the addresses by which nodes carry LANs for each other, the earlier the better; empty: in unicast the node's InternalIP, else the device of the default route")
	cmd.Flags().StringVar(&f.run, "run-dir", kernel.DefaultRun, "`directory` of the LANs' network namespaces, records and locks")
	cmd.Flags().StringVar(&f.cdi, "cdi-dir", cdi.DefaultDir, "`directory` of the container runtime's CDI files")
	cmd.Flags().StringVar(&f.cniSource, "cni-source", "/k8slan-cni", "the CNI plugin's `file`")
	cmd.Flags().StringVar(&f.cniDir, "cni-dir", "", "the container runtime's `directory` of CNI plugins, where to put it as k8slan; empty: nowhere")
	cmd.Flags().BoolVar(&f.megalos, "megalos", false, "put the CNI plugin there as megalos, too, for networks of that type")
	cmd.Flags().StringVar(&f.pluginsDir, "device-plugin-dir", deviceplugin.Dir, "kubelet's `directory` of device plugins")
	cmd.Flags().StringVar(&f.kubelet, "pod-resources-socket", gc.Socket, "`socket` by which kubelet tells of its pods")
	cmd.Flags().StringVar(&f.self.Name, "pod-name", os.Getenv("POD_NAME"),
		"`name` of the pod that this is; without it, claims of pods that went without a CNI DEL are not collected (environment: POD_NAME)")
	cmd.Flags().StringVar(&f.self.Namespace, "pod-namespace", os.Getenv("POD_NAMESPACE"), "`namespace` of that pod (environment: POD_NAMESPACE)")
	return cmd
}

func prefixes(nets []net.IPNet) []netip.Prefix {
	var list []netip.Prefix
	for _, n := range nets {
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			ones, _ := n.Mask.Size()
			list = append(list, netip.PrefixFrom(a.Unmap(), ones))
		}
	}
	return list
}

func (f *nodeFlags) runNode(ctx context.Context) error {
	log, err := f.logger()
	if err != nil {
		return err
	}
	evpnConfig, err := f.evpn(f.node)
	if err != nil {
		return err
	}
	host := kernel.New(kernel.Paths{Run: f.run})
	defer host.Close()
	// Before spokes are offered; not by an init container, because kubelet refuses them until the daemon is back.
	if f.cniDir != "" {
		if err := cni.EnableMegalos(f.run, f.megalos); err != nil {
			return err
		}
		stays, err := megalosInUse(ctx, host, f.cniDir)
		if err != nil {
			return err
		}
		if stays && !f.megalos {
			log.Warn("the CNI plugin stays as megalos, for pods that are attached by it are to be detached; it goes when the daemon starts and none is left")
		}
		installed, err := installPlugin(f.cniSource, f.cniDir, f.megalos || stays)
		if err != nil {
			return err
		}
		log.Info("the CNI plugin is in its place", "dir", f.cniDir, "new", installed)
	}
	mgr, err := f.manager()
	if err != nil {
		return err
	}
	peers, err := f.peers(mgr)
	if err != nil {
		return err
	}
	lans := lanmgr.New(host, f.cdi, log)
	plugins := deviceplugin.New(f.pluginsDir, log)
	collector := gc.New(f.kubelet, f.self, lans, log)
	filter := firewall.New("", firewall.TableName, log)
	sources := metrics.Sources{Reports: lans.Reports, Registered: plugins.Registered, Dropped: filter.Dropped}
	var joined *evpn.Instance
	if evpnConfig != nil {
		evpnConfig.Kernel, evpnConfig.Log = host, log
		joined = evpn.New(*evpnConfig)
		sources.EVPN = joined
	}
	m := metrics.New(sources)
	lans.OnObserve, collector.Collected = m.Observed, m.Collected
	plugins.OnRegistration(m.Registration)
	if err := register(m); err != nil {
		return err
	}
	config := agent.Config{
		Node:      f.node,
		Version:   version,
		Informers: mgr.GetCache(),
		Client:    mgr.GetClient(),
		APIReader: mgr.GetAPIReader(),
		Peers:     peers,
		VTEPs:     prefixes(f.vteps),
		Kernel:    host,
		Manager:   lans,
		Firewall:  filter,
		Advertise: func(spokes []agent.Spoke) {
			plugins.Set(toDevicePlugin(spokes))
			m.Advertised(spokes)
		},
		OnPublish: m.Published,
		Events:    mgr.GetEventRecorder("k8slan-node"),
		Log:       log,
	}
	if joined != nil {
		config.EVPN = joined
		config.Reflectors = types.NamespacedName{Namespace: f.self.Namespace, Name: f.reflectors}
	}
	agent := agent.New(config)
	err = errors.Join(
		mgr.Add(peers),
		mgr.Add(manager.RunnableFunc(lans.Run)),
		mgr.Add(manager.RunnableFunc(filter.Run)),
		mgr.Add(manager.RunnableFunc(plugins.Run)),
		mgr.Add(manager.RunnableFunc(agent.Run)),
		mgr.Add(manager.RunnableFunc(collector.Run)),
		mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
			report.Listen(ctx, f.run, log, m.Outcome)
			return nil
		})),
		mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
			if joined != nil {
				f.followPasswords(ctx, f.node, joined, log)
			}
			return nil
		})),
		f.serveHealth(mgr,
			func(context.Context) error { return agent.Ready() },
			func(context.Context) error { return plugins.Ready() }),
	)
	if err != nil {
		return fmt.Errorf("set up the daemon: %w", err)
	}
	log.Info("k8slan node starts", "version", version, "node", f.node)
	defer log.Info("k8slan node ends, LANs stay", "node", f.node)
	return start(ctx, mgr, log)
}

// manager has the informers: of every LAN, of Nodes and LANNodes this node's own, and of EndpointSlices those of the reflectors.
func (f *nodeFlags) manager() (ctrl.Manager, error) {
	config, err := f.rest("node")
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme), v1beta1.AddToScheme(scheme)); err != nil {
		return nil, fmt.Errorf("register the API's kinds: %w", err)
	}
	own := cache.ByObject{Field: fields.OneTermEqualSelector("metadata.name", f.node)}
	stop := shutdownTimeout
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:         scheme,
		MapperProvider: func(*rest.Config, *http.Client) (meta.RESTMapper, error) { return restMapper(), nil },
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&corev1.Node{}: own, &v1beta1.LANNode{}: own,
				&discoveryv1.EndpointSlice{}: {Namespaces: map[string]cache.Config{
					f.self.Namespace: {LabelSelector: labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: f.reflectors})},
				}},
			},
		},
		Metrics:                 metricsserver.Options{BindAddress: f.metricsAddress},
		GracefulShutdownTimeout: &stop,
	})
	if err != nil {
		return nil, fmt.Errorf("set up the daemon: %w", err)
	}
	return mgr, nil
}

// peers has the informer of every node's LANNode. It is a cache of its own, because a cache has one informer of a kind, and starts to
// watch when it is first asked.
func (f *nodeFlags) peers(mgr ctrl.Manager) (cache.Cache, error) {
	peers, err := cache.New(mgr.GetConfig(), cache.Options{
		HTTPClient: mgr.GetHTTPClient(),
		Scheme:     mgr.GetScheme(),
		Mapper:     mgr.GetRESTMapper(),
		ByObject:   map[client.Object]cache.ByObject{&v1beta1.LANNode{}: {Transform: agent.StripPeer}},
	})
	if err != nil {
		return nil, fmt.Errorf("set up the daemon: %w", err)
	}
	return peers, nil
}

// restMapper are the kinds that the daemon deals with. It need not ask the API server for them, and so comes up
// while that is away, as it may be after a power loss.
func restMapper() meta.RESTMapper {
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion, v1beta1.GroupVersion})
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Node"), meta.RESTScopeRoot)
	mapper.Add(v1beta1.GroupVersion.WithKind("LANNode"), meta.RESTScopeRoot)
	mapper.Add(v1beta1.GroupVersion.WithKind("LAN"), meta.RESTScopeNamespace)
	mapper.Add(discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), meta.RESTScopeNamespace)
	// A cache of one namespace asks for the scope of lists as well (multiNamespaceCache.List in controller-runtime's pkg/cache).
	mapper.Add(discoveryv1.SchemeGroupVersion.WithKind("EndpointSliceList"), meta.RESTScopeNamespace)
	return mapper
}

func toDevicePlugin(spokes []agent.Spoke) []deviceplugin.Spoke {
	offers := make([]deviceplugin.Spoke, len(spokes))
	for i, s := range spokes {
		offers[i] = deviceplugin.Spoke(s)
	}
	return offers
}
