{{- define "k8slan.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "k8slan.labels" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The labels by which a workload finds its pods; takes the component's name. */ -}}
{{- define "k8slan.selector" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* Whether nodes speak BGP: empty if not. */ -}}
{{- define "k8slan.evpn" -}}
{{- if or .Values.evpn.enabled (eq .Values.discovery "evpn") }}true{{ end }}
{{- end }}

{{- /* The same of reflectors. */ -}}
{{- define "k8slan.reflectors" -}}
{{- if and (include "k8slan.evpn" .) .Values.evpn.reflectors.replicas }}true{{ end }}
{{- end }}

{{- /* A router as the daemon's flag has it; takes what the values say of it, and its place among them. */ -}}
{{- define "k8slan.peer" -}}
{{- $p := index . 0 -}}
address={{ $p.address }}
{{- with $p.port }},port={{ int64 . }}{{ end }}
{{- with $p.as }},as={{ int64 . }}{{ end }}
{{- with $p.holdTime }},hold-time={{ . }}{{ end }}
{{- with $p.multihop }},multihop={{ int64 . }}{{ end }}
{{- if $p.passwordSecret }},password-file=/etc/k8slan/bgp/peer-{{ index . 1 }}/password{{ end }}
{{- if $p.ipv6VTEPs }},ipv6-vteps{{ end }}
{{- end }}

{{- /* The Secrets with passwords of BGP sessions that a daemon has, as JSON. */ -}}
{{- define "k8slan.passwords" -}}
{{- $all := list }}
{{- if include "k8slan.evpn" . }}
{{- if and (include "k8slan.reflectors" .) .Values.evpn.reflectors.passwordSecret }}
{{- $all = append $all (dict "name" "reflectors" "secret" .Values.evpn.reflectors.passwordSecret) }}
{{- end }}
{{- range $i, $peer := .Values.evpn.peers }}
{{- with $peer.passwordSecret }}{{ $all = append $all (dict "name" (printf "peer-%d" $i) "secret" .) }}{{ end }}
{{- end }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{- /* Devices as a sentence has them; takes a list in which "" is the default route's. */ -}}
{{- define "k8slan.devices" -}}
{{- $names := list }}
{{- range . }}{{ $names = append $names (. | default "the device that a node takes by itself") }}{{ end }}
{{- join ", " $names }}
{{- end }}

{{- /* What Helm runs at an event: takes the event and the weight, and optionally the policy of deletion. */ -}}
{{- define "k8slan.hook" -}}
helm.sh/hook: {{ index . 0 }}
helm.sh/hook-weight: {{ index . 1 | quote }}
helm.sh/hook-delete-policy: {{ if gt (len .) 2 }}{{ index . 2 }}{{ else }}before-hook-creation,hook-succeeded{{ end }}
{{- end }}

{{- /* A container that does one thing with the API server; takes the root, the container's name and its arguments. */ -}}
{{- define "k8slan.hookContainer" -}}
{{- $root := index . 0 -}}
name: {{ index . 1 }}
image: {{ include "k8slan.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
args: {{ toJson (index . 2) }}
env:
  - name: POD_NAMESPACE
    valueFrom:
      fieldRef:
        fieldPath: metadata.namespace
{{ include "k8slan.unprivileged" $root }}
{{- end }}

{{- define "k8slan.unprivileged" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
resources:
  requests:
    cpu: 10m
    memory: 16Mi
  limits:
    memory: 256Mi
{{- end }}

{{- /* Where pods of the controller's kind may run. */ -}}
{{- define "k8slan.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
priorityClassName: {{ .Values.controller.priorityClassName | quote }}
nodeSelector:
  {{- toYaml .Values.controller.nodeSelector | nindent 2 }}
tolerations:
  {{- toYaml .Values.controller.tolerations | nindent 2 }}
{{- end }}
