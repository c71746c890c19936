package controller

import (
	"encoding/json"
	"fmt"
	"maps"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/k8slan/k8slan/crd/v1beta1"
)

// Labels and annotation of the NADs that k8slan writes.
const (
	labelManagedBy = "app.kubernetes.io/managed-by"
	labelLAN       = "lan.k8slan.io/lan"
	managedBy      = "k8slan"
	// annotationResource makes Multus look up the device that kubelet allocated for this resource.
	annotationResource = "k8s.v1.cni.cncf.io/resourceName"
)

// netConf is the CNI configuration in a NAD, in the form that package cni reads.
type netConf struct {
	CNIVersion   string          `json:"cniVersion"`
	Name         string          `json:"name"`
	Type         string          `json:"type"`
	Kind         string          `json:"kind"`
	LAN          string          `json:"lan"`
	NS           string          `json:"ns"`
	Spoke        string          `json:"spoke,omitempty"`
	Pool         string          `json:"pool,omitempty"`
	Capabilities map[string]bool `json:"capabilities"`
	IPAM         json.RawMessage `json:"ipam,omitempty"`
}

// wantNADs returns the two NADs of every spoke and pool that the LAN holds.
func wantNADs(lan *v1beta1.LAN) ([]nadv1.NetworkAttachmentDefinition, error) {
	if lan.Status.Holds == nil {
		return nil, nil
	}
	var want []nadv1.NetworkAttachmentDefinition
	for _, spoke := range lan.Status.Holds.Spokes {
		for _, kind := range []v1beta1.AttachmentKind{v1beta1.KindVeth, v1beta1.KindMacvtap} {
			nad, err := newNAD(lan, spoke, kind)
			if err != nil {
				return nil, fmt.Errorf("NAD of spoke %q of LAN %s: %w", spoke, lanName(lan), err)
			}
			want = append(want, nad)
		}
	}
	return want, nil
}

func newNAD(lan *v1beta1.LAN, spoke string, kind v1beta1.AttachmentKind) (nadv1.NetworkAttachmentDefinition, error) {
	conf := netConf{
		CNIVersion:   "1.0.0",
		Name:         v1beta1.VethNAD(spoke),
		Type:         "k8slan",
		Kind:         string(kind),
		LAN:          lanName(lan),
		NS:           lan.Status.Holds.NS,
		Spoke:        spoke,
		Capabilities: map[string]bool{"mac": true},
	}
	if _, ok := lan.Spec.Pool(spoke); ok {
		conf.Spoke, conf.Pool = "", spoke
	}
	switch {
	case kind == v1beta1.KindMacvtap:
		conf.Name = v1beta1.MacvtapNAD(spoke)
	case lan.Spec.IPAM != nil:
		conf.IPAM = lan.Spec.IPAM.Section
	}
	config, err := json.Marshal(conf)
	if err != nil {
		return nadv1.NetworkAttachmentDefinition{}, err
	}
	return nadv1.NetworkAttachmentDefinition{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:       lan.Namespace,
			Name:            conf.Name,
			Labels:          map[string]string{labelManagedBy: managedBy, labelLAN: lan.Name},
			Annotations:     map[string]string{annotationResource: v1beta1.Resource(spoke)},
			OwnerReferences: []metav1.OwnerReference{ownerReference(lan)},
		},
		Spec: nadv1.NetworkAttachmentDefinitionSpec{Config: string(config)},
	}, nil
}

func ownerReference(lan *v1beta1.LAN) metav1.OwnerReference {
	return *metav1.NewControllerRef(lan, v1beta1.GroupVersion.WithKind("LAN"))
}

// nadChanges are the writes that lead from the present NADs to the desired ones.
type nadChanges struct {
	create, update, remove []nadv1.NetworkAttachmentDefinition
}

// diffNADs returns the changes from the NADs in the LAN's namespace to those that the LAN should have. It leaves NADs
// that are not the LAN's as they are.
func diffNADs(lan *v1beta1.LAN, want, have []nadv1.NetworkAttachmentDefinition) nadChanges {
	var changes nadChanges
	present := map[string]nadv1.NetworkAttachmentDefinition{}
	for _, nad := range have {
		present[nad.Name] = nad
	}
	wanted := map[string]bool{}
	for _, nad := range want {
		wanted[nad.Name] = true
		old, ok := present[nad.Name]
		if !ok {
			changes.create = append(changes.create, nad)
		} else if mayRepair(lan, &old) && !upToDate(&old, &nad) {
			changes.update = append(changes.update, repaired(old, nad))
		}
	}
	for _, nad := range have {
		if !wanted[nad.Name] && metav1.IsControlledBy(&nad, lan) && nad.DeletionTimestamp.IsZero() {
			changes.remove = append(changes.remove, nad)
		}
	}
	return changes
}

// mayRepair says whether the LAN may overwrite a NAD: its owner is the LAN or a deleted LAN of the same name, or it has
// no owner and the LAN's labels.
func mayRepair(lan *v1beta1.LAN, nad *nadv1.NetworkAttachmentDefinition) bool {
	if owner := metav1.GetControllerOf(nad); owner != nil {
		return isLAN(owner) && owner.Name == lan.Name
	}
	return nad.Labels[labelManagedBy] == managedBy && nad.Labels[labelLAN] == lan.Name
}

func isLAN(owner *metav1.OwnerReference) bool {
	return owner != nil && owner.Kind == "LAN" && owner.APIVersion == v1beta1.GroupVersion.String()
}

// upToDate says whether a NAD has all that k8slan writes. Others may add labels, annotations and owners.
func upToDate(have, want *nadv1.NetworkAttachmentDefinition) bool {
	ref, owner := want.OwnerReferences[0], metav1.GetControllerOf(have)
	return have.Spec.Config == want.Spec.Config &&
		contains(have.Labels, want.Labels) && contains(have.Annotations, want.Annotations) &&
		owner != nil && owner.UID == ref.UID && owner.Name == ref.Name
}

func contains(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// repaired returns the present NAD with all that k8slan writes restored.
func repaired(have, want nadv1.NetworkAttachmentDefinition) nadv1.NetworkAttachmentDefinition {
	nad := *have.DeepCopy()
	nad.Spec = want.Spec
	nad.Labels, nad.Annotations = merged(nad.Labels, want.Labels), merged(nad.Annotations, want.Annotations)
	owners := []metav1.OwnerReference{want.OwnerReferences[0]}
	for _, o := range have.OwnerReferences {
		if o.Controller == nil || !*o.Controller {
			owners = append(owners, o)
		}
	}
	nad.OwnerReferences = owners
	return nad
}

func merged(have, want map[string]string) map[string]string {
	m := map[string]string{}
	maps.Copy(m, have)
	maps.Copy(m, want)
	return m
}
