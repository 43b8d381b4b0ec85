/** The style sheet of the HTML report: light or dark as the reader's system is, and narrow screens too. */
export function pageStyle(): string {
  return `
:root{color-scheme:light dark;--ground:#f6f7f9;--paper:#fff;--ink:#1c2330;--soft:#5b6575;--line:#dfe3e9;--well:#f1f3f6;--fail:#c62f3b;--pass:#1d8a55;--na:#8892a0;--un:#b07a12;--accent:#2f5fd0;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(prefers-color-scheme:dark){:root{--ground:#12151b;--paper:#1a1f28;--ink:#e5e9f0;--soft:#98a3b3;--line:#2c3440;--well:#141820;--fail:#ff6b74;--pass:#4cc38a;--na:#7d8897;--un:#e0b04c;--accent:#7ea2ff}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main,footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
.kicker{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.04em;text-transform:uppercase}
h1{margin:.2rem 0 .4rem;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:2.4rem 0 .7rem;font-size:1.25rem}
h3{margin:1.6rem 0 .4rem;font-size:1rem}
h3 small{margin-left:.5rem;color:var(--soft);font-weight:400}
code,pre{font-family:var(--mono);font-size:.88em}
.facts{display:flex;flex-wrap:wrap;gap:.1rem 1.4rem;margin:0 0 1.1rem;font-size:.88rem}
.facts div{display:flex;gap:.4rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0}
.banner{display:inline-block;margin:0 0 1.2rem;padding:.45rem .9rem;border-radius:.5rem;font-weight:600;color:#fff;overflow-wrap:anywhere}
.banner.good{background:#1d8a55}.banner.fair{background:#a06c08}.banner.bad{background:#c62f3b}
.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:.8rem}
.card{padding:.8rem 1rem;background:var(--paper);border:1px solid var(--line);border-radius:.6rem}
.card b{display:block;font-size:1.9rem;line-height:1.1;color:var(--tone);font-variant-numeric:tabular-nums}
.card span{color:var(--soft)}
.fail{--tone:var(--fail)}.pass{--tone:var(--pass)}.not-applicable{--tone:var(--na)}.untestable{--tone:var(--un)}
.bar{display:flex;gap:2px;height:.5rem;border-radius:.25rem;overflow:hidden}
.bar i{min-width:3px;background:var(--tone)}
main>.bar{margin-top:.9rem}
.overview{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
.overview th{padding:.25rem .6rem .25rem 0;text-align:left;font-weight:400}
.overview thead th{padding-right:0;padding-left:.6rem;color:var(--soft);font-size:.82rem;text-align:right;white-space:nowrap}
.overview td{padding:.25rem 0 .25rem .6rem;text-align:right;color:var(--tone)}
.overview td.fail{font-weight:700}
.overview .share{width:32%}
.overview tbody tr{border-top:1px solid var(--line)}
.overview a{color:inherit;text-decoration-color:var(--line);text-underline-offset:.2em}
.filters{display:flex;flex-wrap:wrap;gap:.6rem}
.filters fieldset{display:flex;flex-wrap:wrap;gap:.2rem .9rem;margin:0;padding:.3rem .9rem .5rem;border:1px solid var(--line);border-radius:.6rem;background:var(--paper)}
.filters legend{padding:0 .4rem;color:var(--soft);font-size:.82rem}
.filters label{cursor:pointer;white-space:nowrap}
.filters input{accent-color:var(--tone,var(--accent))}
.list{background:var(--paper);border:1px solid var(--line);border-radius:.6rem;overflow:hidden}
.check{display:block;border-left:4px solid var(--tone);color:inherit;text-decoration:none}
.check+.check{border-top:1px solid var(--line)}
.check:target{box-shadow:inset 0 0 0 2px var(--accent)}
.check summary,a.check{display:grid;grid-template-columns:7rem 4.6rem 4.4rem 1fr auto;gap:.6rem;align-items:baseline;padding:.32rem .8rem;cursor:pointer;list-style:none}
.check summary::-webkit-details-marker{display:none}
.check summary:hover,a.check:hover{background:color-mix(in srgb,var(--tone) 9%,transparent)}
#failed .check>summary{background:color-mix(in srgb,var(--tone) 6%,transparent)}
#failed .title{font-weight:600}
.verdict{color:var(--tone);font-weight:600;white-space:nowrap;font-size:.9rem}
.level{font-size:.75rem;letter-spacing:.05em;color:var(--soft)}
.section{color:var(--soft);font-variant-numeric:tabular-nums;font-size:.88rem}
.detail{padding:.1rem .8rem .7rem;border-top:1px solid var(--line)}
.reason{margin:.6rem 0;font-weight:600;color:var(--fail);overflow-wrap:anywhere}
.not-applicable .reason,.untestable .reason{color:inherit;font-weight:400}
.detail ol{margin:.5rem 0;padding-left:1.9rem;font-size:.9rem;overflow-wrap:anywhere}
.detail li::marker{color:var(--soft)}
.detail pre{margin:.25rem 0 .5rem;padding:.45rem .7rem;background:var(--well);border-radius:.4rem;line-height:1.45;max-height:9.2em;overflow:auto;white-space:pre}
.meta{margin:.3rem 0 0;color:var(--soft);font-size:.82rem}
footer{padding:2.5rem 1.25rem;color:var(--soft);font-size:.88rem}
@media(max-width:46rem){.cards{grid-template-columns:repeat(2,1fr)}.check summary,a.check{grid-template-columns:auto auto auto 1fr}.title{grid-column:1/-1;grid-row:2}.section{justify-self:end}.overview .share,.overview thead th:nth-child(2){display:none}.overview thead th{font-size:.7rem;line-height:1.2}.detail pre{font-size:.75em}}
@media print{.filters{display:none}body{background:#fff}}
`;
}
