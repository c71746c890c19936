// Command frames sends and receives Ethernet frames inside a test pod or a
// test VM.
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/safchain/ethtool"
	"github.com/spf13/cobra"

	"github.com/k8slan/k8slan/test/frames"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGPIPE)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "frames:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var iface string
	root := &cobra.Command{
		Use:           "frames",
		Short:         "Send and receive Ethernet frames on an interface",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVarP(&iface, "interface", "i", "", "the interface")
	if err := root.MarkPersistentFlagRequired("interface"); err != nil {
		panic(err) // no such flag: a mistake in this function
	}
	root.AddCommand(send(&iface), catalog(&iface), listen(&iface), stream(&iface), respond(&iface))
	return root
}

func send(iface *string) *cobra.Command {
	var count, rate int
	cmd := &cobra.Command{
		Use:   "send FRAME...",
		Short: "Send frames given in hex, from the destination address on",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var all [][]byte
			for _, arg := range args {
				frame, err := hex.DecodeString(arg)
				if err != nil {
					return fmt.Errorf("frame %q is not hex: %w", arg, err)
				}
				all = append(all, frame)
			}
			return withSender(*iface, func(s *frames.Sender) error {
				return paced(cmd.Context(), count, rate, func(int) error { return sendAll(s, all) })
			})
		},
	}
	cmd.Flags().IntVarP(&count, "count", "n", 1, "how often to send them all")
	cmd.Flags().IntVar(&rate, "rate", 1000, "how often per second")
	return cmd
}

func catalog(iface *string) *cobra.Command {
	var names []string
	cmd := &cobra.Command{
		Use:   "catalog",
		Short: "Send one frame of every kind, from the interface's address and with its MTU",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return withSender(*iface, func(s *frames.Sender) error {
				all := frames.Catalog(s.Interface.HardwareAddr, s.Interface.MTU)
				for _, name := range names {
					if !slices.Contains(frames.Names(all), name) {
						return fmt.Errorf("no frame is called %s, there are %v", name, frames.Names(all))
					}
				}
				for _, f := range all {
					if len(names) > 0 && !slices.Contains(names, f.Name) {
						continue
					}
					if err := s.Send(f.Bytes); err != nil {
						return fmt.Errorf("%s: %w", f.Name, err)
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().StringSliceVar(&names, "name", nil, "send only the frames of these names")
	return cmd
}

func listen(iface *string) *cobra.Command {
	var count int
	var patience time.Duration
	var etherType uint16
	var src, dst, marker string
	cmd := &cobra.Command{
		Use:   "listen",
		Short: "Print what arrives, a frame per line in hex",
		Long: "Print what arrives, a frame per line in hex with all its VLAN tags.\n" +
			"The line \"listening\" on standard error says that from now on nothing is missed.\n" +
			"It is an error if fewer frames than --count arrive in time.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter := frames.Filter{EtherType: etherType, Marker: marker}
			var err error
			if filter.Src, err = address(src); err != nil {
				return err
			}
			if filter.Dst, err = address(dst); err != nil {
				return err
			}
			seen := 0
			err = receive(cmd.Context(), *iface, patience, func(frame []byte) (done bool) {
				if filter.Match(frame) {
					fmt.Fprintf(cmd.OutOrStdout(), "%x\n", frame)
					seen++
				}
				return count > 0 && seen >= count
			})
			if err == nil && seen < count {
				return fmt.Errorf("%d of %d frames arrived on %s in %s", seen, count, *iface, patience)
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.IntVarP(&count, "count", "n", 0, "end after so many frames; 0: only when the time is over")
	flags.DurationVar(&patience, "for", 10*time.Second, "how long to listen")
	flags.Uint16Var(&etherType, "ethertype", 0, "only frames of this outermost type, such as 0x88cc")
	flags.StringVar(&src, "src", "", "only frames from this address")
	flags.StringVar(&dst, "dst", "", "only frames to this address")
	flags.StringVar(
		&marker,
		"marker",
		"",
		"only frames that contain this text; "+frames.Marker+" is in all that frames sends",
	)
	return cmd
}

func stream(iface *string) *cobra.Command {
	var id uint32
	var count int
	root := &cobra.Command{Use: "stream", Short: "Send numbered frames at an even rate, or count what is lost of them"}
	root.PersistentFlags().Uint32Var(&id, "id", 1, "the stream's number, if there are several")
	root.PersistentFlags().IntVarP(&count, "count", "n", 1000, "how many frames the stream has; 0: until the sender "+
		"is interrupted")
	root.AddCommand(streamSend(iface, &id, &count), streamReceive(iface, &id, &count))
	return root
}

func streamSend(iface *string, id *uint32, count *int) *cobra.Command {
	var dst string
	var rate int
	cmd := &cobra.Command{
		Use:   "send",
		Short: "Send numbered frames; of an endless stream print, when interrupted, how many",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			to, err := address(dst)
			if err != nil {
				return err
			}
			return withSender(*iface, func(s *frames.Sender) error {
				sent := 0
				err := paced(cmd.Context(), *count, rate, func(seq int) error {
					sent = seq + 1
					return s.Send(frames.Stream(to, s.Interface.HardwareAddr, *id, uint64(seq)))
				})
				if *count == 0 && errors.Is(err, context.Canceled) {
					fmt.Fprintln(cmd.OutOrStdout(), sent)
					return nil
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&dst, "dst", "", "the receiver's address; an unknown one, that is flooded, if empty")
	cmd.Flags().IntVar(&rate, "rate", 1000, "frames per second")
	return cmd
}

func streamReceive(iface *string, id *uint32, count *int) *cobra.Command {
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "receive",
		Short: "Count what arrives of a stream, and print it as JSON",
		Long: "Count what arrives of a stream until it is complete or the time is over, and print\n" +
			"{\"received\":…,\"lost\":…,\"duplicates\":…,\"reordered\":…," +
			"\"longestLoss\":…,\"firstLost\":…,\"resumed\":…}.\n" +
			"The line \"listening\" on standard error says that from now on nothing is missed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			counter := frames.Counter{ID: *id, Total: uint64(*count)}
			err := receive(cmd.Context(), *iface, patience, func(frame []byte) (done bool) {
				counter.Add(frame, time.Now())
				return counter.Complete()
			})
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(counter.Tally())
		},
	}
	cmd.Flags().DurationVar(&patience, "for", 30*time.Second, "how long to wait for the stream's end")
	return cmd
}

func respond(iface *string) *cobra.Command {
	var addresses []string
	var connections uint64
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "respond",
		Short: "Answer ARP, ping and TCP from raw frames, and print as JSON what came",
		Long: "Answer ARP, neighbour discovery, ping and TCP for addresses that the kernel doesn't have, from raw " +
			"frames,\n" +
			"dropping what has a wrong checksum or is larger than the MTU. At the end, or when terminated, print\n" +
			"{\"pings\":…,\"good\":…,\"bad\":…,\"tooLarge\":…,\"opened\":…,\"closed\":…,\"bytes\":…}.\n" +
			"The line \"listening\" on standard error says that from now on nothing is missed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			responder := frames.Responder{}
			for _, text := range addresses {
				address, err := netip.ParseAddr(text)
				if err != nil {
					return fmt.Errorf("address to answer for: %w", err)
				}
				responder.Addresses = append(responder.Addresses, address)
			}
			if err := wholeFrames(*iface); err != nil {
				return err
			}
			err := withSender(*iface, func(s *frames.Sender) error {
				responder.MAC, responder.MTU = s.Interface.HardwareAddr, s.Interface.MTU
				var sendErr error
				err := receive(cmd.Context(), *iface, patience, func(frame []byte) (done bool) {
					sendErr = sendAll(s, responder.Answer(frame))
					return sendErr != nil || responder.Received().Closed >= connections
				})
				return errors.Join(sendErr, err)
			})
			if err != nil && !errors.Is(err, context.Canceled) { // by a signal: that is an end, too
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(responder.Received())
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&addresses, "address", nil, "the addresses to answer for")
	flags.Uint64VarP(&connections, "count", "n", 1, "end after so many connections are closed")
	flags.DurationVar(&patience, "for", 10*time.Second, "how long to answer")
	return cmd
}

// wholeFrames has the kernel hand on what comes as it comes, as who reads frames
// raw must: generic receive offload puts several of them together.
func wholeFrames(iface string) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return fmt.Errorf("open a socket for ethtool: %w", err)
	}
	defer e.Close()
	const gro = "rx-gro"
	have, err := e.Features(iface)
	if err == nil && have[gro] {
		err = e.Change(iface, map[string]bool{gro: false})
	}
	if err != nil {
		return fmt.Errorf("switch %s of %s off: %w", gro, iface, err)
	}
	return nil
}

// withSender calls use with a sender on the interface.
func withSender(iface string, use func(*frames.Sender) error) error {
	s, err := frames.NewSender(iface)
	if err != nil {
		return err
	}
	return errors.Join(use(s), s.Close())
}

func sendAll(s *frames.Sender, all [][]byte) error {
	for _, frame := range all {
		if err := s.Send(frame); err != nil {
			return err
		}
	}
	return nil
}

// paced calls do with 0 to count-1, or for ever if count is 0, rate times per second; what was missed
// because the machine is busy is done as soon as possible.
func paced(ctx context.Context, count, rate int, do func(int) error) error {
	if rate <= 0 {
		return fmt.Errorf("a rate of %d per second never ends", rate)
	}
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for i := 0; count == 0 || i < count; i++ {
		timer.Reset(time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(rate))))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if err := do(i); err != nil {
			return err
		}
	}
	return nil
}

// receive calls take with what arrives until that is done, the time is over or
// the program is interrupted.
// It is an error if the kernel dropped a frame because this was too slow.
func receive(ctx context.Context, iface string, patience time.Duration, take func([]byte) (done bool)) error {
	r, err := frames.NewReceiver(iface)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "listening")
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for done := false; !done; {
		frame, err := r.Receive(limited)
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			break
		}
		if err != nil {
			return errors.Join(err, r.Close())
		}
		done = take(frame)
	}
	dropped, err := r.Dropped()
	if dropped > 0 {
		err = fmt.Errorf("the kernel dropped %d frames on %s because this program read too slowly", dropped, iface)
	}
	return errors.Join(err, r.Close())
}

// address parses a MAC address; none is nil.
func address(text string) (net.HardwareAddr, error) {
	if text == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 {
		return nil, fmt.Errorf("%q is no Ethernet address such as 02:00:00:00:00:01", text)
	}
	return mac, nil
}
