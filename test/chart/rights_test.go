package chart

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

var update = flag.Bool("update", false, "write docs/rights.md anew")

const rightsPage = "../../docs/rights.md"

// accounts are our service accounts, in the order of the page, and who they are.
var accounts = []struct{ name, who string }{
	{"k8slan-node", "The daemon on every node."},
	{"k8slan-controller", "The controller."},
	{"k8slan-test", "The pod of `helm test` that asks; exists only while it runs."},
	{"k8slan-upgrade", "The job of `helm upgrade`; exists only while it runs."},
	{"k8slan-uninstall", "The jobs of `helm uninstall`; exists only while they run."},
	{"k8slan-residue", "The last step of `helm uninstall`; removes itself within minutes."},
}

func TestRightsPageMatchesChart(t *testing.T) {
	want := rights(t, renderAll(t))
	if *update {
		if err := os.WriteFile(rightsPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(rightsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Error("docs/rights.md is not what the chart grants: run make generate")
	}
}

// rights is the page.
func rights(t *testing.T, objects []unstructured.Unstructured) string {
	t.Helper()
	var page strings.Builder
	page.WriteString(`# Rights

What each of k8slan's service accounts may do in the cluster. This page is generated from the chart (` + "`make generate`" + `).
No rule has a wildcard, and none reaches Secrets.
`)
	granted := map[string][]string{}
	for _, o := range objects {
		if !strings.HasSuffix(o.GetKind(), "Binding") || o.GroupVersionKind().Group != rbacv1.GroupName {
			continue
		}
		binding := convert[rbacv1.ClusterRoleBinding](t, o)
		where := "cluster"
		if o.GetKind() == "RoleBinding" {
			where = "`" + o.GetNamespace() + "`"
		}
		rules := roleOf(t, objects, binding.RoleRef, o.GetNamespace())
		for _, subject := range binding.Subjects {
			granted[subject.Name] = append(granted[subject.Name], rows(rules, where)...)
		}
	}
	for _, o := range objects {
		if o.GetKind() == "ServiceAccount" && !slices.ContainsFunc(accounts, func(a struct{ name, who string }) bool { return a.name == o.GetName() }) {
			t.Errorf("service account %s is missing in the list of accounts of this test", o.GetName())
		}
	}
	for _, a := range accounts {
		fmt.Fprintf(&page, "\n## %s\n\n%s\n\n| resource | verbs | where |\n|---|---|---|\n", a.name, a.who)
		for _, row := range granted[a.name] {
			page.WriteString(row)
		}
		delete(granted, a.name)
	}
	for name := range granted {
		t.Errorf("rights are bound to service account %s, which the chart does not make", name)
	}
	page.WriteString("\n## For people\n\nThe chart adds to Kubernetes' own roles; `edit` takes in `view`, and `admin` takes in `edit`.\n\n| role | resource | verbs |\n|---|---|---|\n")
	for _, o := range objects {
		for label := range o.GetLabels() {
			if role, ok := strings.CutPrefix(label, "rbac.authorization.k8s.io/aggregate-to-"); ok {
				for _, rule := range convert[rbacv1.ClusterRole](t, o).Rules {
					fmt.Fprintf(&page, "| `%s` | %s | %s |\n", role, resources(rule), strings.Join(rule.Verbs, ", "))
				}
			}
		}
	}
	page.WriteString("\n## What RBAC cannot say\n\nValidatingAdmissionPolicies say it; they run in the API server, and k8slan has no webhook.\n\n| policy | what it refuses |\n|---|---|\n")
	for _, o := range objects {
		if o.GetKind() != "ValidatingAdmissionPolicy" {
			continue
		}
		refuses := o.GetAnnotations()["lan.k8slan.io/refuses"]
		if refuses == "" {
			t.Errorf("policy %s has no annotation lan.k8slan.io/refuses, which says what it refuses", o.GetName())
		}
		fmt.Fprintf(&page, "| `%s` | %s |\n", o.GetName(), refuses)
	}
	return page.String()
}

// roleOf finds the rules that a binding refers to.
func roleOf(t *testing.T, objects []unstructured.Unstructured, ref rbacv1.RoleRef, namespace string) []rbacv1.PolicyRule {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == ref.Kind && o.GetName() == ref.Name && (ref.Kind == "ClusterRole" || o.GetNamespace() == namespace) {
			return convert[rbacv1.ClusterRole](t, o).Rules
		}
	}
	t.Fatalf("the chart has no %s %s", ref.Kind, ref.Name)
	return nil
}

// rows are the lines of a table.
func rows(rules []rbacv1.PolicyRule, where string) []string {
	var lines []string
	for _, rule := range rules {
		lines = append(lines, fmt.Sprintf("| %s | %s | %s |\n", resources(rule), strings.Join(rule.Verbs, ", "), where))
	}
	return lines
}

// resources names what a rule is about.
func resources(rule rbacv1.PolicyRule) string {
	var names []string
	for _, group := range rule.APIGroups {
		for _, resource := range rule.Resources {
			name := resource
			if group != "" {
				name += "." + group
			}
			names = append(names, "`"+name+"`")
		}
	}
	text := strings.Join(names, ", ")
	if len(rule.ResourceNames) > 0 {
		text += " named `" + strings.Join(rule.ResourceNames, "`, `") + "`"
	}
	return text
}

// renderAll renders the chart with everything that is off by default.
func renderAll(t *testing.T) []unstructured.Unstructured {
	t.Helper()
	return render(t, "k8slan-system", "limits.vniRange={1000,1999}", "limits.underlayDevices={eth1}", "uninstall.removeLANs=true", "evpn.enabled=true")
}
