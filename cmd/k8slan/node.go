package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/k8slan/k8slan/cni"
	"github.com/k8slan/k8slan/cni/report/receiver"
	"github.com/k8slan/k8slan/deviceplugin"
	"github.com/k8slan/k8slan/lanmgr"
	"github.com/k8slan/k8slan/lanmgr/agent"
	"github.com/k8slan/k8slan/lanmgr/cdi"
	"github.com/k8slan/k8slan/lanmgr/evpn"
	"github.com/k8slan/k8slan/lanmgr/firewall"
	"github.com/k8slan/k8slan/lanmgr/gc"
	"github.com/k8slan/k8slan/lanmgr/kernel"
	"github.com/k8slan/k8slan/lanmgr/kernel/watch"
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
	kubelet    string // socket of kubelet's pod resources API
	vteps      []net.IPNet
	self       gc.Pod
}

func nodeCommand() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Run the daemon of one node: it builds the LANs and advertises their spokes to kubelet",
		Long: `Run the daemon of one node.

It installs the CNI plugin, builds each accepted LAN that the node belongs to, and undoes changes that other programs
make to it. It advertises the LAN's spokes and pools to kubelet as resources macvtap.k8slan.io/k8slan-veth-<spoke>, and
reports the state of the LANs in the LANNode object with the node's name. It runs as root in the node's network
namespace. When it ends, the LANs stay. When it starts again, it advertises their spokes again.

/healthz answers with 200 while the daemon runs. /readyz answers with 200 when every LAN has been reconciled and every
spoke is registered with kubelet.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.node == "" {
				return usageError{errors.New("the node has no name: give --node-name or set NODE_NAME")}
			}
			if f.reflectors != "" && f.self.Namespace == "" {
				return usageError{errors.New("--evpn-reflectors names a Service in the daemon's own namespace: " +
					"give --pod-namespace or set POD_NAMESPACE")}
			}
			return f.runNode(cmd.Context())
		},
	}
	f.daemonFlags.add(cmd.Flags())
	f.evpnFlags.add(cmd.Flags())
	f.addNode(cmd.Flags())
	return cmd
}

func (f *nodeFlags) addNode(flags *pflag.FlagSet) {
	flags.StringVar(&f.node, "node-name", os.Getenv("NODE_NAME"),
		"`name` of the Node object (environment: NODE_NAME)")
	flags.IPNetSliceVar(&f.vteps, "vtep-cidrs", nil,
		"`ranges` of addresses for VTEPs, in order of preference; "+
			"empty: with unicast discovery the node's InternalIP, else the device of the default route")
	addRunDir(flags, &f.run)
	flags.StringVar(&f.cdi, "cdi-dir", cdi.DefaultDir, "`directory` of the container runtime's CDI files")
	flags.StringVar(&f.cniSource, "cni-source", "/k8slan-cni", "`file` of the CNI plugin")
	flags.StringVar(&f.cniDir, "cni-dir", "",
		"the container runtime's `directory` of CNI plugins, where the CNI plugin is installed as k8slan; "+
			"empty: it is not installed")
	flags.BoolVar(&f.megalos, "megalos", false,
		"also install the CNI plugin as megalos, for networks of that type")
	flags.StringVar(&f.pluginsDir, "device-plugin-dir", deviceplugin.Dir, "kubelet's `directory` of device plugins")
	flags.StringVar(&f.kubelet, "pod-resources-socket", gc.Socket, "`socket` of kubelet's pod resources API")
	flags.StringVar(&f.self.Name, "pod-name", os.Getenv("POD_NAME"),
		"`name` of the daemon's own pod (environment: POD_NAME); "+
			"empty: claims of pods that were removed without a CNI DEL are not collected")
	flags.StringVar(&f.self.Namespace, "pod-namespace", os.Getenv("POD_NAMESPACE"),
		"`namespace` of the daemon's own pod (environment: POD_NAMESPACE)")
}

// addRunDir adds the flag --run-dir.
func addRunDir(flags *pflag.FlagSet, run *string) {
	flags.StringVar(run, "run-dir", kernel.DefaultRun,
		"`directory` of the LANs' network namespaces, records and locks")
}

// prefixes converts the values of a flag.
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
	// This comes before spokes are advertised. An init container could not do it, because kubelet refuses the spokes'
	// devices while the daemon is not running.
	if err := f.installCNI(ctx, host, log); err != nil {
		return err
	}
	mgr, err := f.manager()
	if err != nil {
		return err
	}
	peers, err := f.peers(mgr)
	if err != nil {
		return err
	}
	d := f.newDaemon(host, evpnConfig, log)
	if err := register(d.metrics); err != nil {
		return err
	}
	d.agent = agent.New(f.agentConfig(d, mgr, peers))
	if err := errors.Join(mgr.Add(peers), f.addTasks(mgr, d), f.serveHealth(mgr, d.checks()...)); err != nil {
		return fmt.Errorf("set up the daemon: %w", err)
	}
	log.Info("k8slan node starts", "version", version, "node", f.node)
	defer log.Info("k8slan node ends, LANs stay", "node", f.node)
	return start(ctx, mgr, log)
}

// installCNI installs the CNI plugin, and enables or disables networks of type megalos.
func (f *nodeFlags) installCNI(ctx context.Context, host *kernel.Node, log *slog.Logger) error {
	if f.cniDir == "" {
		return nil
	}
	if err := cni.EnableMegalos(f.run, f.megalos); err != nil {
		return err
	}
	inUse, err := megalosInUse(ctx, host, f.cniDir)
	if err != nil {
		return err
	}
	if inUse && !f.megalos {
		log.Warn("the CNI plugin stays installed as megalos, because pods that it attached will be detached by it; " +
			"it is removed when the daemon starts and no such pod is left")
	}
	installed, err := installPlugin(f.cniSource, f.cniDir, f.megalos || inUse)
	if err != nil {
		return err
	}
	log.Info("the CNI plugin is installed", "dir", f.cniDir, "new", installed)
	return nil
}

// daemon has the parts of a node's daemon.
type daemon struct {
	host     *kernel.Node
	lans     *lanmgr.Manager
	plugins  *deviceplugin.Plugins
	gc       *gc.Collector
	firewall *firewall.Filter
	evpn     *evpn.Instance // nil without --evpn-as
	metrics  *metrics.Metrics
	agent    *agent.Agent
	log      *slog.Logger
}

// newDaemon returns the daemon's parts except for the agent, and connects them with the metrics.
func (f *nodeFlags) newDaemon(host *kernel.Node, evpnConfig *evpn.Config, log *slog.Logger) *daemon {
	d := &daemon{
		host:     host,
		lans:     lanmgr.New(host, f.cdi, log),
		plugins:  deviceplugin.New(f.pluginsDir, log),
		firewall: firewall.New("", firewall.TableName, log),
		log:      log,
	}
	d.gc = gc.New(f.kubelet, f.self, d.lans, log)
	sources := metrics.Sources{
		Reports: d.lans.Reports, Registered: d.plugins.Registered, Dropped: d.firewall.Dropped,
	}
	if evpnConfig != nil {
		evpnConfig.Kernel, evpnConfig.Log = watch.New(host), log
		d.evpn = evpn.New(*evpnConfig)
		sources.EVPN = d.evpn
	}
	d.metrics = metrics.New(sources)
	d.lans.OnObserve = d.metrics.Observed
	d.gc.Collected = d.metrics.Collected
	d.plugins.OnRegistration(d.metrics.Registration)
	return d
}

// agentConfig connects the agent with the API server and the other parts.
func (f *nodeFlags) agentConfig(d *daemon, mgr ctrl.Manager, peers cache.Cache) agent.Config {
	config := agent.Config{
		Node:      f.node,
		Version:   version,
		Informers: mgr.GetCache(),
		Client:    mgr.GetClient(),
		APIReader: mgr.GetAPIReader(),
		Peers:     peers,
		VTEPs:     prefixes(f.vteps),
		Kernel:    watch.New(d.host),
		Manager:   d.lans,
		Firewall:  d.firewall,
		Advertise: func(spokes []agent.Spoke) {
			d.plugins.Set(toDevicePlugin(spokes))
			d.metrics.Advertised(spokes)
		},
		OnPublish: d.metrics.Published,
		Events:    mgr.GetEventRecorder("k8slan-node"),
		Log:       d.log,
	}
	if d.evpn != nil {
		config.EVPN = d.evpn
		config.Reflectors = types.NamespacedName{Namespace: f.self.Namespace, Name: f.reflectors}
	}
	return config
}

// addTasks adds everything that runs until the daemon ends.
func (f *nodeFlags) addTasks(mgr ctrl.Manager, d *daemon) error {
	tasks := []manager.RunnableFunc{
		d.lans.Run, d.firewall.Run, d.plugins.Run, d.agent.Run, d.gc.Run,
		func(ctx context.Context) error {
			receiver.Run(ctx, f.run, d.log, d.metrics.Outcome)
			return nil
		},
	}
	if d.evpn != nil {
		tasks = append(tasks, func(ctx context.Context) error {
			f.followPasswords(ctx, f.node, d.evpn, d.log)
			return nil
		})
	}
	var errs []error
	for _, task := range tasks {
		errs = append(errs, mgr.Add(task))
	}
	return errors.Join(errs...)
}

// checks returns the checks of /readyz.
func (d *daemon) checks() []func(context.Context) error {
	return []func(context.Context) error{
		func(context.Context) error { return d.agent.Ready() },
		func(context.Context) error { return d.plugins.Ready() },
	}
}

// toDevicePlugin converts spokes to the type of the device plugins.
func toDevicePlugin(spokes []agent.Spoke) []deviceplugin.Spoke {
	converted := make([]deviceplugin.Spoke, len(spokes))
	for i, s := range spokes {
		converted[i] = deviceplugin.Spoke(s)
	}
	return converted
}
