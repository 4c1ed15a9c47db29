{{- define "router.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "router.peers" -}}
{{- printf "%s-peers" (include "router.name" . | trunc 57 | trimSuffix "-") -}}
{{- end -}}

{{- define "router.peersPort" -}}
{{- (.Values.config.peers | default dict).port | default 8082 | int -}}
{{- end -}}

{{- define "router.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "router.labels" -}}
{{ include "router.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "router.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "router.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The router's file: what the values say, and what the pod decides. */}}
{{- define "router.file" -}}
{{- if not .Values.config.replicas -}}
{{- fail "config.replicas is empty: name at least one engine, with its url and its hardware or rates" -}}
{{- end -}}
{{- $config := deepCopy .Values.config -}}
{{- $listen := merge (dict "host" "0.0.0.0" "port" .Values.containerPort) ($config.listen | default dict) -}}
{{- $log := merge ($config.log | default dict) (dict "format" "json") -}}
{{- $_ := set $config "listen" $listen -}}
{{- $_ := set $config "log" $log -}}
{{- if .Values.keysSecret -}}
{{- $_ := set $config "auth" (merge (dict "keys_file" "/etc/servegym/keys/keys.yaml") ($config.auth | default dict)) -}}
{{- end -}}
{{- if .Values.peersSecret -}}
{{- $port := include "router.peersPort" . | int -}}
{{- $address := printf "%s:%d" (include "router.peers" .) $port -}}
{{- $_ := set $config "peers" (merge (dict "host" "0.0.0.0" "port" $port "addresses" (list $address) "secret_env" "SERVEGYM_PEERS") ($config.peers | default dict)) -}}
{{- end -}}
{{ toYaml $config }}
{{- end -}}
